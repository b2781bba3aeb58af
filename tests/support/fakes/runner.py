"""Our runner with a fault. A test fills in what is in capitals below the imports."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np

REAL, FAULT = "RUNNER", "KIND"

if FAULT == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if FAULT == "hang":
    time.sleep(600)
if FAULT == "nonsense":
    print("all is well")
    sys.exit(0)
if FAULT == "old":
    sys.exit("lib/libexecutorch.so: version `GLIBCXX_3.4.32' not found")
if FAULT == "refuse":
    print(json.dumps({"error": "no such operator", "stage": "load"}))
    sys.exit(3)

done = subprocess.run([REAL, *sys.argv[1:]], stdout=subprocess.PIPE, check=False)
last = done.stdout.splitlines()[-1]
if done.returncode == 0 and "--logits" in sys.argv:
    path, answer = Path(sys.argv[sys.argv.index("--logits") + 1]), json.loads(last)
    if FAULT == "short":
        path.write_bytes(path.read_bytes()[:-4])
    elif FAULT == "garbled":
        path.write_bytes(b"\1\2\3\4" + path.read_bytes()[4:])
    elif FAULT == "none":
        path.unlink()
    elif FAULT == "wrong":
        rows = np.fromfile(path, "<f4").reshape(-1, answer["vocab_size"])
        data = np.roll(rows, 1, axis=1).tobytes()
        path.write_bytes(data)
        answer["logits_crc32"] = f"{zlib.crc32(data):08x}"
    last = json.dumps(answer).encode()
sys.stdout.buffer.write(last + b"\n")
sys.exit(done.returncode)
