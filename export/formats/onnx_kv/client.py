"""The script of a `processes.LimitedWorker`: onnxruntime-genai's tokenizer, which is opened with a model only."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import

import onnx
import onnxruntime_genai as og
from onnx import TensorProto, helper


def answer(request: dict[str, Any]) -> str:
    """Ids of each text, without BOS."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in Path(request["folder"]).glob("*token*.json"):
            shutil.copyfile(path, folder / path.name)
        _write_model(folder)
        tokenizer = og.Tokenizer(og.Model(temporary))
        return json.dumps([tokenizer.encode(text).tolist() for text in request["texts"]])


def _write_model(folder: Path) -> None:
    """The least that opens: ids in, the same as floats out."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s"])
    node = helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "least", [ids], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
        **dict.fromkeys(("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers"), 1),
        "num_key_value_heads": 1,
    }
    fields = {"type": "llama", "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 1, "context_length": 1}
    config = {"model": {**fields, "decoder": decoder}, "search": {}}
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
