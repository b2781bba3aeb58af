"""Meta's own files give the logits that Meta's code computes from them; files with mistakes end in one line."""

import base64
import json
import os
import pickle
import resource
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict
from functools import partial

import psutil
import pytest
import torch

from export import checkpoints
from export.checkpoints import meta, open_source, tokenizer
from export.checkpoints.origin import Package, parse_origin
from export.errors import ExportError
from export.host import processes
from export.pipeline import export
from export.plan import ModelSpec, load_named, load_plan
from export.quantization.eager import eager
from tests.support.checkpoints import LLAMA, refusal
from tests.support.harms import archive, put, saved
from tests.support.reliability import NOT_DAMAGED

PARAMS = {
    "dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "multiple_of": 96,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
}  # fmt: skip
FFN = 480  # int(1.3 · int(8 · 128 / 3)) = 443, rounded up to a multiple of 96
PTH = "consolidated.00.pth"


def meta_model(params):
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    torch.manual_seed(5)
    model = Transformer(ModelArgs(max_batch_size=1, max_seq_len=256, **params)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            wide = (
                torch.randn_like(weight) / weight.shape[-1] ** 0.5
                if weight.ndim > 1
                else 1 + 0.1 * torch.randn_like(weight)
            )
            weight.copy_(wide.bfloat16())
    return model


def write(folder, tensors=None, params=PARAMS):
    """As Meta saves: bfloat16, one file."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(random_tensors() if tensors is None else tensors, folder / PTH)
    return folder


def random_tensors(tied=False):
    shapes = {"tok_embeddings": (300, 128), "norm": (128,), "output": (300, 128)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.{name}": shape
            for name, shape in {
                "attention.wq": (128, 128), "attention.wk": (64, 128), "attention.wv": (64, 128),
                "attention.wo": (128, 128), "feed_forward.w1": (FFN, 128), "feed_forward.w2": (128, FFN),
                "feed_forward.w3": (FFN, 128), "attention_norm": (128,), "ffn_norm": (128,),
            }.items()
        }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    made = {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return made | ({"output.weight": made["tok_embeddings.weight"].clone()} if tied else {})


@pytest.mark.parametrize("change", [{}, {"n_kv_heads": 4}, {"ffn_dim_multiplier": None, "use_scaled_rope": False}])
def test_logits_are_metas_own(one_process, tmp_path, change):
    pytest.importorskip("llama_models", reason="llama-models (Meta's reference) is not installed")
    params = PARAMS | change
    theirs = meta_model(params)
    state = {name: weight.bfloat16() for name, weight in theirs.state_dict().items()}
    weights = checkpoints.load(LLAMA, parse_origin(str(write(tmp_path / "original", state, params))))
    tokens = torch.randint(0, 300, (1, 150), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = torch.cat([theirs(tokens[:, :100], 0), theirs(tokens[:, 100:], 100)], dim=1)
        logits = eager(weights.read, weights.architecture, "none")(tokens)[0]
        unscaled = weights.architecture.model_copy(update={"rope_theta": 10000.0})
        wrong = eager(weights.read, unscaled, "none")(tokens)[0]
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= 1e-4
    assert (wrong - expected).abs().max() > 1e-2


def test_without_the_order_of_rows_it_would_be_another_model(one_process, tmp_path, monkeypatch):
    """The negative twin."""
    pytest.importorskip("llama_models", reason="llama-models (Meta's reference) is not installed")
    theirs = meta_model(PARAMS)
    weights = checkpoints.load(LLAMA, parse_origin(str(write(tmp_path / "original", theirs.state_dict()))))
    monkeypatch.setattr(meta, "in_hugging_face_order", lambda name, weight, a: weight)
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        assert (eager(weights.read, weights.architecture, "none")(tokens)[0] - theirs(tokens, 0)).abs().max() > 0.1


@pytest.mark.parametrize(("sku", "name"), [("Llama3.2-1B-Instruct", "1b"), ("Llama3.2-3B-Instruct", "3b")])
def test_metas_own_parameters_are_our_models(sku, name):
    """From the keys of params.json, as llama-models lists them for each release."""
    skus = pytest.importorskip("llama_models.sku_list", reason="llama-models is not installed")
    params = meta.Params(**skus.resolve_model(sku).arch_args)
    architecture = meta.architecture_of(params, Package("llama_models", "__init__.py").path, tied=True)
    assert architecture == load_named(ModelSpec, "models", f"llama32-{name}-instruct").architecture


def test_llama_3_1_and_3_have_other_scalings():
    skus = pytest.importorskip("llama_models.sku_list", reason="llama-models is not installed")
    for sku, factor, length in (("Llama3.1-8B", 8.0, 131072), ("Llama-3-8B", None, 8192)):
        params = meta.Params(**skus.resolve_model(sku).arch_args)
        architecture = meta.architecture_of(params, Package("llama_models", "__init__.py").path, tied=False)
        assert (architecture.rope_scaling.factor if architecture.rope_scaling else None) == factor
        assert (architecture.max_position_embeddings, architecture.intermediate_size) == (length, 14336)


def test_a_tied_head_is_recognized_by_its_numbers(tmp_path):
    tied = open_source(parse_origin(str(write(tmp_path / "tied", random_tensors(tied=True)))), None)
    assert (tied.architecture.tie_word_embeddings, tied.architecture.rope_scaling.factor) == (True, 32.0)
    assert "lm_head.weight" not in tied.shapes
    assert tied.description == "Meta's consolidated.00.pth, 21 tensors, tied head"
    untied = open_source(parse_origin(str(write(tmp_path / "untied", random_tensors()))), None)
    assert (untied.architecture.tie_word_embeddings, untied.architecture.rope_scaling.factor) == (False, 8.0)
    assert "lm_head.weight" in untied.shapes


def test_a_head_that_is_almost_tied_is_a_damaged_one(tmp_path):
    tensors = random_tensors(tied=True)
    tensors["output.weight"][299, 127] += 1
    assert "but for 1 of 300 rows; the file is damaged" in refusal(LLAMA, write(tmp_path / "original", tensors))


def test_a_file_without_a_head_is_tied(tmp_path):
    tensors = random_tensors()
    del tensors["output.weight"]
    tensors["rope.freqs"] = torch.ones(16)
    weights = checkpoints.load(LLAMA, parse_origin(str(write(tmp_path / "original", tensors))))
    assert weights.architecture.tie_word_embeddings
    assert set(weights.sha256) == {"params.json", PTH}


def test_opening_and_reading_keeps_nothing_in_memory(tmp_path):
    """50 MB on disk, twice: embedding and head are compared in blocks, and nothing stays mapped."""
    tensors = random_tensors() | {"tok_embeddings.weight": torch.zeros(200_000, 128, dtype=torch.bfloat16)}
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    folder = write(tmp_path / "original", tensors, PARAMS | {"vocab_size": 200_000})
    del tensors
    source = open_source(parse_origin(str(folder)), None)
    before = psutil.Process().memory_info().rss
    assert source.architecture.tie_word_embeddings
    source.read("model.norm.weight")
    assert psutil.Process().memory_info().rss - before < 40e6


# ── tokenizer.model ─────────────────────────────────────────────────────────────────────────────────────────────────


def line(token, rank):
    return base64.b64encode(token) + b" " + str(rank).encode() + b"\n"


BYTES = b"".join(line(bytes([i]), i) for i in range(256))
WORDS = BYTES + b"".join(line(word, 256 + i) for i, word in enumerate([b"he", b"th", b"the", b" the"]))


@pytest.fixture
def whole(tmp_path):
    """With a tokenizer of Llama 3's kind: bytes, four words, its 256 special tokens."""
    tensors = random_tensors() | {"tok_embeddings.weight": torch.randn(516, 128).bfloat16()}
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    folder = write(tmp_path / "original", tensors, PARAMS | {"vocab_size": 516})
    (folder / "tokenizer.model").write_bytes(WORDS)
    return folder


def test_an_artifact_is_built_from_it(whole, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    built = export(load_plan("llama", "int4-g32", "onnx-cpu"), parse_origin(str(whole)), tmp_path / "out")
    assert (built.tokenizer.bos_id, built.tokenizer.eos_ids) == (260, (261, 268, 269))
    assert built.checkpoint.description.startswith("Meta's consolidated.00.pth")
    loaded = tokenizer.load(tmp_path / "out")
    assert loaded.tokenize(" the") == ["Ġthe"]
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")


def test_the_tokenizer_is_the_one_that_lies_there_now(whole, tmp_path):
    """tiktoken caches a copy by path in a temporary folder, and would return that."""
    assert written_tokenizer(whole, tmp_path / "a").convert_ids_to_tokens(256) == "he"
    (whole / "tokenizer.model").write_bytes(WORDS.replace(line(b"he", 256), line(b"eh", 256)))
    assert written_tokenizer(whole, tmp_path / "b").convert_ids_to_tokens(256) == "eh"


def written_tokenizer(folder, out):
    out.mkdir()
    open_source(parse_origin(str(folder)), None).write_tokenizer(out)
    return tokenizer.load(out)


TOKENIZERS = {
    "empty": b"",
    "sentencepiece": b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
    "a rank twice": BYTES + line(b"ab", 255),
    "a rank left out": BYTES + line(b"ab", 300),
    "a token twice": BYTES + line(b"a", 256),
    "an empty token": BYTES + b" 256\n",
    "no base64": BYTES + b"!!!! 256\n",
    "a rank in words": BYTES + b"YWI= many\n",
    "a negative rank": line(b"a", -1),
    "three columns": BYTES + b"YWI= 256 1\n",
    "not every byte": b"".join(line(bytes([i]), i) for i in range(255)),
    "a token of a megabyte": BYTES + line(bytes(2**20), 256),
    "17 megabytes": bytes(17 * 2**20),
}


@pytest.mark.parametrize("mistake", TOKENIZERS)
def test_a_tokenizer_model_that_is_none(tmp_path, mistake):
    folder = write(tmp_path / "original")
    (folder / "tokenizer.model").write_bytes(TOKENIZERS[mistake])
    with pytest.raises(ExportError, match=r"tokenizer\.model: (line \d+ is no token|not every byte|larger than)"):
        open_source(parse_origin(str(folder)), None).write_tokenizer(tmp_path)


def test_a_missing_tokenizer_model(tmp_path):
    with pytest.raises(ExportError, match=r"tokenizer\.model: missing.* copy it beside"):
        open_source(parse_origin(str(write(tmp_path / "original"))), None).write_tokenizer(tmp_path)


# ── params.json ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": 0}, "n_heads: Input should be greater than 0"),
        ({"n_heads": 3}, "n_heads 3 does not divide dim 128"),
        ({"n_kv_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"dim": 10**400}, "dim: Input should be less than"),
        ({"dim": "wide"}, "dim: Input should be a valid integer"),
        ({"n_layers": 3}, "tensors are missing: model.layers.2"),
        ({"n_layers": 1}, "9 tensors are not part of the model"),
        ({"n_layers": 10**7}, "num_hidden_layers"),
        ({"vocab_size": -2}, "vocab_size: Input should be greater than or equal to -1"),
        ({"vocab_size": 0}, "vocab_size: Input should be greater than 0"),
        ({"vocab_size": 301}, "has shape [300, 128], the architecture needs [301, 128]"),
        ({"multiple_of": 256}, "has shape [480, 128], the architecture needs [512, 128]"),
        ({"ffn_dim_multiplier": float("inf")}, "ffn_dim_multiplier"),
        ({"rope_theta": None}, "rope_theta"),
        ({"norm_eps": -1}, "norm_eps"),
        ({"vision_chunk_size": 560}, "vision_chunk_size: unknown key; read are Meta's bfloat16 text models"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args: unknown key"),
        ({"lora_args": {"rank": 16, "scale": 2.0}}, "lora_args: unknown key"),
        ({"use_scaled_rope": "sometimes"}, "use_scaled_rope"),
        ({"high_freq_factor": 1.0, "rope_scale_factor": 8}, "high_freq_factor: Input should be greater than 1"),
    ],
)
def test_parameters_our_model_does_not_have(tmp_path, change, words):
    assert words in refusal(LLAMA, write(tmp_path / "original", params=PARAMS | change))


@NOT_DAMAGED
def test_a_vocabulary_that_is_left_open_is_the_embeddings(tmp_path):
    """As Meta's code fills in −1."""
    opened = checkpoints.load(LLAMA, parse_origin(str(write(tmp_path / "o", params=PARAMS | {"vocab_size": -1}))))
    assert opened.architecture.vocab_size == 300


@NOT_DAMAGED
def test_a_file_of_another_name_is_said_to_be_there(tmp_path):
    folder = write(tmp_path / "original")
    (folder / PTH).rename(folder / "consolidated.pth")
    assert f"{PTH}: missing, but params.json is there; rename consolidated.pth if" in refusal(LLAMA, folder)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta"])
def test_a_missing_parameter_is_named(tmp_path, key):
    params = {name: value for name, value in PARAMS.items() if name != key}
    assert f"{key}: missing" in refusal(LLAMA, write(tmp_path / "original", params=params))


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"dim": ' * 50_000])
def test_a_params_json_that_is_none(tmp_path, content):
    folder = write(tmp_path / "original")
    (folder / "params.json").write_text(content)
    assert "params.json: " in refusal(LLAMA, folder)


# ── consolidated.00.pth ─────────────────────────────────────────────────────────────────────────────────────────────


class Call:
    """A pickle that calls something when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def change(**tensors):
    return lambda folder: write(folder, random_tensors() | {key.replace("__", "."): t for key, t in tensors.items()})


pth = partial(put, PTH)


def end_of(directory_bytes):
    return b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, directory_bytes, 0, 0)


def replace_pickle(data):
    return archive(lambda name, old: data if name.endswith("data.pkl") else old)


def beside(name, *, first):
    """A second pickle, whose name torch's reader takes for the checked one's."""

    def spoil(folder):
        path = folder / PTH
        with zipfile.ZipFile(path) as old:
            records = [(record.filename, old.read(record)) for record in old.infolist()]
        root = records[0][0].partition("/")[0]
        second = (f"{root}/{name}", pickle.dumps(Call(os.mkdir, "ran"), 2))
        with zipfile.ZipFile(path, "w") as new, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there twice
            for record, data in [second, *records] if first else [*records, second]:
                new.writestr(record, data)

    return spoil


HOSTILE = {
    "a call of mkdir": (saved({"norm.weight": Call(os.mkdir, "ran")}), "asks for posix.mkdir"),
    "a call of mkdir, legacy": (pth(pickle.dumps(Call(os.mkdir, "ran"))), "does not end as a zip archive"),
    "legacy torch.save": (saved(random_tensors(), _use_new_zipfile_serialization=False), "its form before 1.6"),
    "a bytearray of a terabyte": (saved({"x": Call(bytearray, 2**40)}), "asks for __builtin__.bytearray"),
    "protocol 4": (saved({"x": Call(os.mkdir, "ran")}, pickle_protocol=4), "asks for STACK_GLOBAL"),
    "a whole module": (saved(torch.nn.Linear(2, 2)), "asks for torch.nn.modules.linear.Linear"),
    "a parameter": (saved({"norm.weight": torch.nn.Parameter(torch.ones(2))}), "asks for torch._utils._rebuild_param"),
    "a sparse tensor": (saved({"norm.weight": torch.ones(2).to_sparse()}), "asks for torch._utils._rebuild_sparse"),
    "integers": (saved({"norm.weight": torch.ones(2, dtype=torch.int8)}), "asks for torch.CharStorage"),
    "float8": (saved({"norm.weight": torch.ones(2).to(torch.float8_e4m3fn)}), "asks for torch._utils._rebuild_tensor"),
    "a list": (saved([torch.ones(2)]), "holds no dictionary of tensors"),
    "an empty dictionary": (saved({}), "holds no dictionary of tensors"),
    "numbers as names": (saved({1: torch.ones(2)}), "its entry 1 is no tensor"),
    "a training checkpoint": (saved({"model": {"norm.weight": torch.ones(2)}, "step": 3}), "inside its entry 'model'"),
    "an OrderedDict in it": (saved({"x": OrderedDict(a=torch.ones(2))}), "inside its entry 'x'; save that entry alone"),
    "no zip": (pth(b"\x80\x02}q\x00."), "does not end as a zip archive"),
    "empty": (pth(b""), "is empty; download it again"),
    "an endless directory": (pth(bytes(100) + end_of(2**32 - 2)), "list of records is longer"),
    "a directory elsewhere": (pth(bytes(100) + end_of(50)), "not a checkpoint that is loaded"),
    "a zip64 end nowhere": (
        pth(bytes(99) + b"PK\x06\x07" + struct.pack("<IQI", 0, 2**63, 1) + end_of(50)), "end of its zip archive is",
    ),
    "compressed": (archive(compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a bomb": (
        archive(lambda name, data: bytes(2**28) if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "big-endian": (archive(lambda name, data: b"big" if "byteorder" in name else data), "not little-endian"),
    "a pickle in capitals before it": (beside("DATA.PKL", first=True), "differ in capitals only"),
    "a pickle in capitals after it": (beside("DATA.PKL", first=False), "differ in capitals only"),
    "two pickles of one name": (beside("data.pkl", first=True), "records under one name"),
    "no pickle": (archive(lambda name, data: None if "data.pkl" in name else data), "holds 0 pickles"),
    "a pickle of 2.5 megabytes": (replace_pickle(b"\x80\x02" + b"N0" * 1_250_000 + b"}."), "holds 1 pickles"),
    "a pickle cut off": (archive(lambda name, data: data[:-40] if "data.pkl" in name else data), "not a checkpoint"),
    "a pickle of nothing": (replace_pickle(b""), "not a checkpoint"),
    "a deep pickle": (replace_pickle(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "not a checkpoint"),
    "a record lost": (archive(lambda name, data: None if name.endswith("/data/3") else data), "not a checkpoint"),
    "one of Hugging Face's names": (change(model__norm__weight=torch.ones(128)), "tensor model.norm.weight is not one"),
    "a layer that is none": (change(layers__x__attention_norm__weight=torch.ones(128)), "is not one of Meta's"),
    "a bias": (change(layers__0__attention__wq__bias=torch.ones(128)), "is not one of Meta's"),
    "a wrong shape": (change(norm__weight=torch.ones(129)), "norm.weight has shape [129]"),
    "a tensor too many": (change(layers__2__ffn_norm__weight=torch.ones(128)), "not part of the model"),
    "NaN": (change(norm__weight=torch.full((128,), float("nan"))), "model.norm.weight holds NaN"),
    "an expanded tensor": (
        change(tok_embeddings__weight=torch.ones(1, 1).expand(2**40, 128)), "has shape [1099511627776, 128]",
    ),
    "two parts": (lambda folder: shutil.copy(folder / PTH, folder / "consolidated.01.pth"), "2 consolidated.*.pth"),
    "no part": (lambda folder: (folder / PTH).unlink(), "consolidated.00.pth: missing"),
}  # fmt: skip


@pytest.mark.hostile(
    "checkpoint", "pickles and zips that run code, name other files or take memory", "not opened; one line"
)
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_file_that_is_no_plain_dictionary_of_weights(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "original")
    spoil, words = HOSTILE[attack]
    spoil(folder)
    before = processes.peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    assert words in refusal(LLAMA, folder)
    assert processes.peak_bytes(resource.getrusage(resource.RUSAGE_SELF)) - before < 200_000_000
    assert not (tmp_path / "ran").exists()


def test_what_is_let_through_is_what_torch_saves(tmp_path):
    """The twin: the check passes plain tensors of every float type, as dict and as OrderedDict."""
    for kind in (dict, OrderedDict):
        tensors = kind(
            (str(t), torch.ones(3, dtype=t)) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        )
        torch.save(tensors, tmp_path / PTH)
        meta.check(tmp_path / PTH)
        loaded = meta.load(tmp_path / PTH)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
