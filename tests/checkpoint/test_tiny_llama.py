"""The example model: deterministic, of the sizes asked for, with words to print."""

import subprocess
import sys

from tokenizers import Tokenizer

from .conftest import REPOSITORY, read_tensors


def contents(model):
    return {path.name: path.read_bytes() for path in model.iterdir()}


def test_same_seed_same_bytes(make_model):
    assert contents(make_model("a")) == contents(make_model("b"))
    assert contents(make_model("c", seed=1)) != contents(make_model("a"))


def test_command_line(make_model, tmp_path):
    script = REPOSITORY / "examples" / "tiny_llama.py"
    command = [sys.executable, script, tmp_path / "made", "--layers", "1", "--tied"]
    subprocess.run([*command, "--vocab-size", "300"], check=True)
    expected = make_model("expected", layers=1, tied=True, vocab_size=300, hidden_size=320)
    assert contents(tmp_path / "made") == contents(expected)


def test_weights_have_the_shapes_that_are_claimed(make_model):
    model = make_model(attention_bias=True, mlp_bias=True, dtype="float32")
    tensors = read_tensors(model / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.bias"][:2] == ("F32", (128,))
    assert tensors["model.layers.1.mlp.down_proj.weight"][:2] == ("F32", (256, 512))


def test_the_vocabulary_is_words(make_model):
    tokenizer = Tokenizer.from_file(str(make_model() / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 128
    ids = tokenizer.encode("The river flows into the sea.").ids
    assert len(set(ids)) == 6
    assert tokenizer.decode(ids) == "the river flows into the sea ."
