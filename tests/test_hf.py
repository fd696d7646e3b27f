"""``crnet.hf``: every method in transformers gives the numbers of the package's own model.

None is named here: a new one is covered the moment its file exists.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crnet.config.model_spec import model_spec
from crnet.config.sections import ModelConfig
from crnet.errors import ConfigError
from crnet.hub.names import own_names
from crnet.inference.generate import generate
from crnet.inference.sampling import Sampling
from shapes import make, one_of_every_method, policies_of, random_tokens, randomised, tiny

pytestmark = pytest.mark.slow

MODELS = one_of_every_method()
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@pytest.fixture(scope="module")
def hf() -> Any:
    """The room; it imports transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import crnet.hf

        return crnet.hf


def adapted(hf: Any, config: ModelConfig, **more: Any) -> tuple[Any, Any]:
    """The package's model and transformers', of the same weights, none at its first value."""
    own = randomised(make(config), torch.float32).eval()
    model = hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(config), **more)).eval()
    assert model.load_state_dict(own.state_dict(), strict=True)
    return own, model


def aligned(model: Any) -> Any:
    """Weights in memory of torch's own: kernels for matrices times vectors sum in another order
    where an address is odd, as those in a mapped file are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@each_model
@torch.no_grad()
def test_logits_are_those_of_the_package_also_after_a_reload(
    hf: Any, config: ModelConfig, tmp_path: Path
) -> None:
    """Bit for bit, on the CPU's attention; names of the weights are the package's."""
    import transformers

    own, model = adapted(hf, config)
    tokens = random_tokens(2, 9)
    wanted = own.logits(tokens)
    assert torch.equal(model(tokens).logits, wanted)
    model.save_pretrained(tmp_path)
    back = aligned(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(back) is hf.CRNetForCausalLM
    assert torch.equal(back(tokens).logits, wanted)
    assert back.config.model_config == model.config.model_config
    trained = {name: spec.trained for name, spec in own.spec.tensors.items()}
    assert {name: it.requires_grad for name, it in back.named_parameters()} == trained
    base = aligned(transformers.AutoModel.from_pretrained(tmp_path))
    assert type(base) is hf.CRNetModel
    assert torch.equal(back.lm_head(base(tokens).last_hidden_state), wanted)


@each_model
def test_gradients_and_loss_are_those_of_the_package(hf: Any, config: ModelConfig) -> None:
    """Gradients bit for bit, of one function of the logits; the loss to the rounding of its sum."""
    own, model = adapted(hf, config)
    tokens = random_tokens(2, 9)
    weight = torch.randn(2, 9, 31, generator=torch.Generator().manual_seed(2))
    (own.logits(tokens) * weight).sum().backward()
    found = model(tokens, labels=tokens)
    (found.logits * weight).sum().backward()
    for name, parameter in own.named_parameters():
        other = model.get_parameter(name).grad
        assert (other is None) == (parameter.grad is None), name
        assert other is None or torch.equal(other, parameter.grad), name
    total, count = own(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(found.loss, total / count, rtol=1e-5, atol=0)


@each_model
def test_initial_values_are_those_of_training(hf: Any, config: ModelConfig) -> None:
    torch.manual_seed(5)
    model = hf.CRNetForCausalLM(hf.CRNetConfig(crnet=own_names(config)))
    for name, parameter in make(config, seed=5).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
        assert model.get_parameter(name).requires_grad == parameter.requires_grad, name


def new_tokens(model: Any, tokens: Tensor, mask: Tensor | None = None, **more: Any) -> list[int]:
    """Greedy, of the first row."""
    mask = torch.ones_like(tokens) if mask is None else mask
    words = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None} | more
    found = model.generate(tokens, attention_mask=mask, **words)
    return found[0, tokens.shape[1] :].tolist()


@each_model
def test_generation(hf: Any, config: ModelConfig) -> None:
    """The package's greedy tokens, with every cache and attention, alone and in a padded batch."""
    own, model = adapted(hf, config, eos_token_id=0, pad_token_id=0, bos_token_id=0)
    sampling = Sampling(greedy=True, max_tokens=7, stop_at_end=False)
    for seed in range(3, 23):  # a tied head may repeat one token
        tokens = random_tokens(1, 5, seed=seed)
        wanted = list(generate(own, tokens[0].tolist(), sampling, 0))
        if len(set(wanted)) > 1:
            break
    assert len(set(wanted)) > 1
    static = {"cache_implementation": "static", "disable_compile": True}
    for more in ({}, static, {"use_cache": False}):
        assert new_tokens(model, tokens, **more) == wanted, more
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], 1)
    batch = torch.cat([padded, random_tokens(1, 8, seed=9)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    assert new_tokens(model, batch, mask) == wanted
    beams = new_tokens(model, tokens, num_beams=3)
    assert beams == new_tokens(model, tokens, num_beams=3, use_cache=False)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert new_tokens(model, tokens) == wanted, attention


@each_model
@torch.no_grad()
def test_continuous_batching(hf: Any, config: ModelConfig) -> None:
    """Two rows of unlike lengths in pages of one cache: the tokens of each alone."""
    import transformers

    _, model = adapted(hf, config, eos_token_id=0, pad_token_id=0, bos_token_id=0)
    rows = [random_tokens(1, 5), random_tokens(1, 9, seed=4)]
    wanted = [new_tokens(model, row) for row in rows]
    pages = transformers.ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=32)
    greedy = transformers.GenerationConfig(
        max_new_tokens=7, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    found = model.generate_batch(
        inputs=[row[0].tolist() for row in rows],
        generation_config=greedy,
        continuous_batching_config=pages,
    )
    assert [found[name].generated_tokens for name in sorted(found)] == wanted


@each_model
def test_recomputation_is_the_packages_engine(hf: Any, config: ModelConfig) -> None:
    """Activation checkpointing changes no bit of a gradient; every policy that the model allows."""
    _, model = adapted(hf, config)
    model.train()
    tokens = random_tokens(2, 9)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: it.grad for name, it in model.named_parameters() if it.grad is not None}

    plain = gradients()
    for policy in policies_of(model_spec(config)):
        if policy in ("none", "invert"):  # nothing; not exact
            continue
        model.activation_checkpointing_enable({"policy": policy})
        assert model.is_activation_checkpointing
        found = gradients()
        assert found.keys() == plain.keys()
        assert [name for name in plain if not torch.equal(found[name], plain[name])] == [], policy
        model.activation_checkpointing_disable()
        assert not model.is_activation_checkpointing


def test_what_checkpointing_cannot_do_is_refused(hf: Any) -> None:
    _, model = adapted(hf, tiny())
    with pytest.raises(ConfigError) as refused:
        model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    assert len(refused.value.problems) == 2
    assert not model.is_activation_checkpointing
    attnres = next(config for name, config in MODELS.items() if "attnres" in name)
    _, model = adapted(hf, attnres)
    with pytest.raises(ConfigError, match="cannot be rebuilt"):
        model.activation_checkpointing_enable({"policy": "replay"})


@torch.no_grad()
def test_hidden_states_and_attentions(hf: Any) -> None:
    own, model = adapted(hf, tiny())
    tokens = random_tokens(2, 9)
    model.set_attn_implementation("eager")
    found = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 4
    embedding = own.get_parameter("model.embed_tokens.weight")
    assert torch.equal(found.hidden_states[0], embedding[tokens])
    assert torch.equal(model.lm_head(found.hidden_states[-1]), found.logits)
    assert [tuple(each.shape) for each in found.attentions] == [(2, 4, 9, 9)] * 3
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 4, 9))
    with pytest.raises(ValueError, match="one of them"):
        model.model()


@torch.no_grad()
def test_embeddings_in_the_place_of_tokens(hf: Any) -> None:
    for config in MODELS.values():
        _, model = adapted(hf, config)
        tokens = random_tokens(2, 9)
        embedded = model.get_input_embeddings()(tokens)
        assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)


@torch.no_grad()
def test_gains_stay_fp32_in_bf16(hf: Any, tmp_path: Path) -> None:
    import transformers

    own, model = adapted(hf, tiny())
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, spec in own.spec.tensors.items():
        wanted = torch.float32 if spec.dtype == "float32" else torch.bfloat16
        assert back.get_parameter(name).dtype == wanted, name


def test_a_resized_embedding_is_saved(hf: Any, tmp_path: Path) -> None:
    import transformers

    _, model = adapted(hf, tiny())
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.config.model_config.vocab_size == back.config.vocab_size == 40
    assert back(random_tokens(1, 4)).logits.shape == (1, 4, 40)


def test_configuration(hf: Any) -> None:
    """Either set of names says what the other leaves open; what differs is refused, all at once."""
    config = hf.CRNetConfig(
        crnet={"rank": "8"}, hidden_size=32, num_attention_heads=2, num_hidden_layers=3
    )
    model = config.model_config
    assert (model.hidden_size, model.num_heads, model.num_layers, model.rank) == (32, 2, 3, "8")
    assert config.head_dim == 16
    assert config.num_key_value_heads == 2
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ConfigError) as refused:
        hf.CRNetConfig(
            crnet={"hidden_size": 32, "num_layers": 3}, hidden_size=64, num_hidden_layers=4
        )
    assert len(refused.value.problems) == 2
    for wrong, words in (
        ({"crnet": {"hiden_size": 32}}, "unknown key crnet.hiden_size"),
        ({"crnet": {"linear": "nobody"}}, "load_plugins"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden-size"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"head_dim": 5}, "head-size"),
    ):
        with pytest.raises(ConfigError, match=words):
            hf.CRNetConfig(**wrong)


def test_the_package_does_not_need_transformers(tmp_path: Path) -> None:
    """Where it is missing, it is said what to install."""
    program = (
        "import sys\nsys.modules['transformers'] = None\n"
        "import crnet.train.run, crnet.hub.card\n"
        "from crnet.errors import ConfigError\n"
        "try:\n    import crnet.hf\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'crnet[hf]'" in done.stdout, done.stderr
