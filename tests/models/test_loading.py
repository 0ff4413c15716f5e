"""Loading of tokenizers and bases, and the two ways in which 4-bit weights go silently wrong."""

import copy
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig, set_seed
from trl import ModelConfig

from rlhf_recipes.models import (
    load_causal_lm,
    load_sequence_classifier,
    load_tokenizer,
    loading,
    lora_config,
    quantization_config,
    upcast_trainable,
)
from rlhf_recipes.models.arguments import positions_follow_mask
from rlhf_recipes.models.loading import padding_tokens

FOUR_BIT = ModelConfig(load_in_4bit=True)


@pytest.fixture
def tokenizer_path(tiny_model_path, tmp_path):
    """Save the tiny tokenizer with other special tokens: `tokenizer_path(pad_token=None)`."""

    def save(**changes):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.fixture(scope="module")
def batch(tiny_tokenizer):
    """Token ids and mask of three prompts, padded on the left."""
    ids = torch.randint(len(tiny_tokenizer), (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


class TestTokenizer:
    def test_pads_and_truncates_on_the_left(self, tiny_model_path):
        tokenizer = load_tokenizer(tiny_model_path)
        assert tokenizer(["the film was", "the"], padding=True).attention_mask == [[1, 1, 1], [0, 0, 1]]
        assert tokenizer("the film", truncation=True, max_length=1).input_ids == tokenizer("film").input_ids

    def test_without_a_padding_token_is_refused(self, tokenizer_path):
        path = tokenizer_path(pad_token=None)
        with pytest.raises(ValueError, match=r"no padding token.*tokenizer\.pad_token.*'<eos>'") as error:
            load_tokenizer(path)
        assert path in str(error.value)

    def test_without_an_end_token_is_refused(self, tokenizer_path):
        with pytest.raises(ValueError, match="no end-of-sequence token"):
            load_tokenizer(tokenizer_path(eos_token=None))

    def test_padding_with_the_end_token_is_accepted(self, tokenizer_path):
        tokenizer = load_tokenizer(tokenizer_path(pad_token="<eos>"))
        assert tokenizer.pad_token_id == tokenizer.eos_token_id


class TestLoading:
    def test_a_causal_model_is_the_saved_one_in_float32(self, tiny_model_path, batch):
        model = load_causal_lm(tiny_model_path)
        saved = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
        assert model.dtype == torch.float32
        assert_close(model(**batch).logits, saved(**batch).logits, rtol=0, atol=0)

    @pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
    def test_dtype_is_honoured(self, tiny_model_path, dtype, expected):
        assert load_causal_lm(tiny_model_path, dtype=dtype).dtype == expected

    def test_an_unknown_dtype_is_refused(self, tiny_model_path):
        with pytest.raises(ValueError, match=r"`dtype` must be one of 'auto', 'bfloat16'.*got 'fp32'"):
            load_causal_lm(tiny_model_path, dtype="fp32")

    def test_a_sequence_classifier_has_one_output_and_a_head_that_follows_the_seed(self, tiny_model_path):
        heads = []
        for seed in (1, 1, 2):
            set_seed(seed)
            heads.append(load_sequence_classifier(tiny_model_path).score.weight)
        assert heads[0].shape == (1, 64)
        assert_close(heads[0], heads[1], rtol=0, atol=0)
        assert not torch.equal(heads[0], heads[2])

    def test_that_a_base_has_no_score_is_not_reported_and_what_does_not_fit_is(
        self, tiny_model_path, tmp_path, caplog
    ):
        load_sequence_classifier(tiny_model_path)
        load_causal_lm(tiny_model_path)
        assert not caplog.records
        shutil.copytree(tiny_model_path, tmp_path, dirs_exist_ok=True)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)  # a layer that the configuration has not
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for load in (load_sequence_classifier, load_causal_lm):
            caplog.clear()
            load(str(tmp_path))
            said = [record.getMessage() for record in caplog.records]
            assert len([text for text in said if "LOAD REPORT" in text]) == 1, said
            assert any("model.layers.7.mlp.up_proj.weight" in text for text in said)

    @pytest.mark.parametrize("load", [load_causal_lm, load_sequence_classifier])
    @pytest.mark.parametrize("path", ["./missing", "/no/such/model", "outputs/quickstart/base"])
    def test_a_missing_folder_is_named(self, load, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"Model folder {path!r} does not exist"):
            load(path)

    def test_pickled_weights_are_refused(self, tiny_model_path, tmp_path):
        # A `.bin` file is a pickle, which can run any code when it is read.
        folder = tmp_path / "pickled"
        shutil.copytree(tiny_model_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(load_causal_lm(tiny_model_path).state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            load_causal_lm(str(folder))

    @pytest.mark.parametrize(
        ("config", "name"),
        [
            (GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=2, n_positions=32), "wpe"),
            (
                OPTConfig(vocab_size=32, hidden_size=64, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2),
                "embed_positions",
            ),
        ],
        ids=["gpt2", "opt"],
    )
    def test_absolute_positions_start_after_the_padding(self, config, name, tmp_path):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        model = load_causal_lm(str(tmp_path)).eval()
        assert any(name in module for module, _ in model.named_modules())
        ids = torch.tensor([[5, 6, 7, 8]])
        padded = torch.tensor([[3, 3, 5, 6, 7, 8]])
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            beside_padding = model(input_ids=padded, attention_mask=(padded != 3).long()).logits[:, 2:]
            generated = model.generate(padded, attention_mask=(padded != 3).long(), max_new_tokens=5, do_sample=False)
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        torch.testing.assert_close(beside_padding, alone, atol=1e-5, rtol=1e-5)
        assert generated[0, 2:].tolist() == expected[0].tolist()

    def test_absolute_positions_that_cannot_be_given_are_refused(self):
        class Fixed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed_positions = torch.nn.Embedding(4, 2)
                self.base_model = torch.nn.Identity()

        with pytest.raises(ValueError, match="absolute position embeddings .*embed_positions"):
            positions_follow_mask(Fixed())


class TestQuantizationConfig:
    def test_is_none_when_not_asked_for(self):
        assert quantization_config(ModelConfig()) is None

    def test_four_bits_are_nf4_with_double_quantization_in_the_compute_dtype(self):
        config = quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16"))
        assert config.load_in_4bit
        assert config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_use_double_quant
        assert config.bnb_4bit_compute_dtype == torch.bfloat16

    def test_eight_bits(self):
        config = quantization_config(ModelConfig(load_in_8bit=True))
        assert config.load_in_8bit
        assert not config.load_in_4bit

    @pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
    def test_missing_bitsandbytes_is_named(self, bits, monkeypatch):
        monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
        with pytest.raises(ImportError, match=r"need bitsandbytes.*load_in_4bit: false"):
            quantization_config(ModelConfig(**{bits: True}))
        assert quantization_config(ModelConfig()) is None


class TestLoraConfig:
    def test_carries_the_model_arguments(self):
        args = ModelConfig(lora_r=4, lora_alpha=8, lora_dropout=0.25, lora_target_modules=["q_proj", "v_proj"])
        config = lora_config(args, "CAUSAL_LM")
        assert (config.task_type, config.r, config.lora_alpha, config.lora_dropout) == ("CAUSAL_LM", 4, 8, 0.25)
        assert config.target_modules == {"q_proj", "v_proj"}
        assert not config.use_rslora
        assert not config.use_dora
        assert lora_config(ModelConfig(use_rslora=True), "CAUSAL_LM").use_rslora
        assert lora_config(ModelConfig(use_dora=True), "CAUSAL_LM").use_dora

    @pytest.mark.parametrize("targets", [None, "all-linear", ["all-linear"]])
    def test_adapts_every_linear_layer_but_the_output_head_by_default(self, targets, tiny_model_path):
        config = lora_config(ModelConfig(lora_target_modules=targets), "CAUSAL_LM")
        model = get_peft_model(load_causal_lm(tiny_model_path), config)
        adapted = {
            name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name
        }
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def test_a_reward_model_trains_its_score_head(self, tiny_model_path):
        model = get_peft_model(load_sequence_classifier(tiny_model_path), lora_config(ModelConfig(), "SEQ_CLS"))
        assert any("score" in name for name, p in model.named_parameters() if p.requires_grad)

    @pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]])
    def test_an_adapter_on_the_output_head_is_refused(self, targets):
        with pytest.raises(ValueError, match="names 'lm_head'"):
            lora_config(ModelConfig(lora_target_modules=targets), "CAUSAL_LM")


def test_upcast_changes_trainable_parameters_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    before = model[1].weight.detach().clone()
    upcast_trainable(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].weight.dtype == model[1].bias.dtype == torch.float32
    assert model[1].weight.requires_grad
    assert_close(model[1].weight, before.float(), rtol=0, atol=0)


class TestFourBits:
    """bitsandbytes 0.50 on a CPU with AVX512-BF16 turns to a kernel without backward at the first evaluation."""

    def linear_layers(self, model):
        return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}

    @pytest.mark.parametrize("load", [load_causal_lm, load_sequence_classifier])
    def test_layers_are_quantized_and_never_repacked(self, load, tiny_model_path, batch):
        model = load(tiny_model_path, quantization_config=quantization_config(FOUR_BIT))
        layers = self.linear_layers(model)
        assert len(layers) == 2 * 7
        packed = {name: layer.weight.data.clone() for name, layer in layers.items()}
        model.eval()
        with torch.no_grad():
            model(**batch)
        for name, layer in layers.items():
            assert layer.weight.quant_state.quant_type == "nf4"
            assert layer.weight.quant_state.nested
            assert not layer.support_avx512bf16_for_cpu
            assert torch.equal(layer.weight.data, packed[name])

    @pytest.mark.parametrize("load", [load_causal_lm, load_sequence_classifier])
    def test_gradients_are_right_after_generation_and_evaluation(self, load, tiny_model_path, batch):
        model = load(tiny_model_path, quantization_config=quantization_config(FOUR_BIT))
        twin = load(tiny_model_path)
        task_type = "CAUSAL_LM" if load is load_causal_lm else "SEQ_CLS"
        self.copy_dequantized(model, twin)
        model, twin = (get_peft_model(m, lora_config(ModelConfig(lora_dropout=0.0), task_type)) for m in (model, twin))
        self.copy_trainable(model, twin)

        model.eval()
        with torch.no_grad():
            if load is load_causal_lm:
                model.generate(**batch, max_new_tokens=3)
            model(**batch)
        gradients, expected = (self.gradients(m, batch) for m in (model, twin))
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 1e-4, f"{name}: relative error {error:.2g}"

    def copy_dequantized(self, model, twin):
        linear = self.linear_layers(model)
        for name, parameter in model.named_parameters():
            owner = name.removesuffix(".weight")
            if owner in linear:
                parameter = bnb.functional.dequantize_4bit(parameter.data, linear[owner].weight.quant_state)
            twin.get_parameter(name).data.copy_(parameter.data)

    def copy_trainable(self, model, twin):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)  # a fresh adapter is zero, and half of its gradients with it
                    twin.get_parameter(name).copy_(parameter)

    def gradients(self, model, batch):
        model.train()
        logits = model(**batch).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * weights).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="which files are mapped is read from Linux's /proc")
def test_a_quantized_model_lets_go_of_its_file(tiny_model_path, tmp_path):
    """Weights that stay as they are in the file are views of it; one of them would keep all of it in memory."""
    config = quantization_config(ModelConfig(load_in_4bit=True, dtype="float32"))
    tiny_model_path = shutil.copytree(tiny_model_path, tmp_path / "model")  # which no other test has loaded
    model = load_causal_lm(str(tiny_model_path), quantization_config=config, dtype="float32")
    assert f"{tiny_model_path}/model.safetensors" not in Path("/proc/self/maps").read_text()
    embedding = load_file(f"{tiny_model_path}/model.safetensors")["model.embed_tokens.weight"]
    assert_close(model.get_input_embeddings().weight.data, embedding, rtol=0, atol=0)


def test_one_target_module_is_a_name_and_a_pattern_stays_one(tiny_model_path):
    model = load_causal_lm(tiny_model_path)
    for given, layers in ((["q_proj"], {"q_proj"}), ([r".*\.0\..*_proj"], None), (["all-linear"], None)):
        adapted = get_peft_model(model, lora_config(ModelConfig(lora_target_modules=given), "CAUSAL_LM"))
        names = {
            name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name
        }
        assert names == (layers or {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")})
        model = adapted.unload()


def test_tokens_that_could_pad_are_those_that_no_text_has(tiny_tokenizer):
    """`<user>` and `<assistant>` are put together by the template; one of a refused role is only in its text."""
    assert padding_tokens(tiny_tokenizer) == ["<pad>", "<unk>"]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<|reserved|>", "<|my_PAD|>", "<tool>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    assert padding_tokens(tokenizer) == ["<pad>", "<|my_PAD|>", "<|reserved|>", "<tool>", "<unk>"]
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('<tool> only') }}{% endif %}"
        "{% for message in messages %}{{ '<' + message['role'] + '>' }}{% endfor %}"
    )
    assert padding_tokens(tokenizer) == ["<pad>", "<|my_PAD|>", "<system>", "<|reserved|>", "<unk>"]
    tokenizer.chat_template = None
    assert set(padding_tokens(tokenizer)) > {"<user>", "<assistant>", "<tool>"}
    assert "<eos>" not in padding_tokens(tokenizer)
