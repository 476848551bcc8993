"""Forward passes without data, past the places where values decide."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from tp_hf_config.forward.head_splits import observe
from tp_hf_config.model.build import Refusal, without_data
from tp_hf_config.model.meta_run import NoValues, RealNumbers
from tp_hf_config.model.surroundings import without_caches

META = torch.device("meta")


class TestRealNumbers:
    def test_whole_numbers_stay_real_on_a_model_without_data(self) -> None:
        with RealNumbers():
            positions = torch.arange(4, device=META) + 1
            mask = torch.ones(1, 4, dtype=torch.bool, device=META)
            moved = torch.tensor([[2, 3]]).to(META)
        assert positions.tolist() == [1, 2, 3, 4]
        assert mask.all()
        assert moved.tolist() == [[2, 3]]

    def test_what_is_computed_from_weights_has_a_shape_only(self) -> None:
        embedding = nn.Embedding(10, 3, device=META)
        with RealNumbers():
            out = embedding(torch.tensor([[1, 2]]))
            scaled = out * torch.ones(2, 1)
        assert (out.device, tuple(out.shape)) == (META, (1, 2, 3))
        assert (scaled.device, tuple(scaled.shape)) == (META, (1, 2, 3))

    def test_a_real_mask_chooses_as_many_rows_as_it_has(self) -> None:
        with RealNumbers():
            rows = torch.empty(4, 3, device=META)[torch.tensor([True, False, True, True])]
        assert tuple(rows.shape) == (3, 3)

    def test_a_mask_without_values_chooses_all(self) -> None:
        values = torch.empty(4, 3, device=META)
        with RealNumbers():
            assert tuple(values[values[:, 0] > 0].shape) == (4, 3)
            assert (values > 0).nonzero().tolist()[:2] == [[0, 0], [0, 1]]
            assert [len(axis) for axis in torch.where(values > 0)] == [12, 12]

    def test_negative_padding_is_refused_as_where_it_computes(self) -> None:
        """VITS pads by a kernel less its stride; torch's shapes alone take any number."""
        narrow = nn.ConvTranspose1d(4, 4, 2, stride=4, padding=-1, device=META)
        with RealNumbers(), pytest.raises(RuntimeError, match="negative padding"):
            narrow(torch.empty(1, 4, 8, device=META))

    def test_more_places_than_features_are_refused_as_where_it_computes(self) -> None:
        """Images that go into a text are as wide as it is: Qwen2.5-Omni does not ask."""
        text, features = torch.empty(1, 4, 6, device=META), torch.empty(2, 3, device=META)
        two = torch.tensor([[True, False, True, False]]).unsqueeze(-1)
        for places in (two, two.expand_as(text)):
            with RealNumbers(), pytest.raises(RuntimeError, match="fewer features"):
                text.masked_scatter(places, features)
            with RealNumbers():
                assert text.masked_scatter(places, features.repeat(2, 1)).shape == text.shape

    def test_places_say_how_many_features_there_are_as_where_it_computes(self) -> None:
        text, features = torch.empty(1, 4, 6, device=META), torch.empty(2, 6, device=META)
        three = (torch.tensor([[True, True, False, True]]),)
        two = (torch.tensor([0, 0]), torch.tensor([0, 2]))
        said = r"value tensor of shape \[2, 6\] cannot be .* result of shape \[3, 6\]"
        with RealNumbers(), pytest.raises(RuntimeError, match=said):
            text.index_put(three, features)
        with RealNumbers():
            assert text.index_put(two, features).shape == text.shape
            assert text.index_put(two, features[:1]).shape == text.shape

    def test_so_many_numbers_are_no_sizes(self) -> None:
        """V-JEPA 2's places of 28,224 patches take seconds to compute."""
        with RealNumbers():
            few, many = (torch.ones(n, device=META, dtype=torch.long) * 0.5 for n in (8, 2**22))
            mask = torch.arange(1024, device=META) > torch.arange(1024, device=META).unsqueeze(1)
            hidden = torch.where(mask, 0.0, -1.0)  # Longformer asks such a mask
            waves = (few.sin(), few.cos())
            places = torch.arange(2**20, device=META)
            pairs = places.unsqueeze(1) * places  # 8 TiB
        assert (pairs.is_meta, tuple(pairs.shape), pairs.dtype) == (True, (2**20,) * 2, torch.long)
        assert few.tolist()[:3] == [0.5, 0.5, 0.5]
        assert (many.is_meta, tuple(many.shape), many.dtype) == (True, (2**22,), torch.float32)
        assert (hidden < 0).any()
        assert [(one.is_meta, tuple(one.shape)) for one in waves] == [(True, (8,))] * 2

    def test_of_many_experts_a_few_are_chosen(self) -> None:
        with RealNumbers() as numbers:
            assert numbers.guessed is False
            assert (torch.empty(64, device=META) > 0).nonzero().flatten().tolist() == [*range(8)]
            assert numbers.guessed is True

    def test_what_is_known_is_not_guessed(self) -> None:
        with RealNumbers() as numbers:
            assert torch.tensor([0, 1, 1]).nonzero().flatten().tolist() == [1, 2]
            torch.empty(3, 2, device=META)[torch.tensor([True, False, True])] * 2
        assert numbers.guessed is False

    def test_arguments_of_the_same_shapes_give_the_same_again(self) -> None:
        values = torch.empty(2, 3, 4, device=META)
        whole = torch.empty(2, 3, 4, device=META, dtype=torch.int32)
        norm = nn.BatchNorm1d(3, device=META).eval()
        operations = [
            lambda: values.transpose(1, 2).pow(2),
            lambda: values.pow(2.0),
            lambda: whole.mul(2),
            lambda: whole.mul(2.0),
            lambda: whole.mul(True),
            lambda: torch.cat([values, values], dim=1),
            lambda: torch.cat([values, values], dim=2),
            lambda: values.to(torch.float16).softmax(-1),
            lambda: norm(values),
        ]
        plain = [operation() for operation in operations]
        with RealNumbers():
            runs = [[operation() for operation in operations] for _ in range(3)]
            views = [values.transpose(0, 1) for _ in range(3)]
            changed = [values.add_(1) for _ in range(3)]
        for run in runs:
            for one, expected in zip(run, plain, strict=True):
                assert (one.shape, one.stride(), one.dtype) == (
                    expected.shape,
                    expected.stride(),
                    expected.dtype,
                )
        assert all(first is not again for first, again in zip(*runs[:2], strict=True))
        assert all(view._base is values for view in views)
        assert all(one is values for one in changed)

    def test_the_default_dtype_is_asked_for_anew(self) -> None:
        whole = torch.empty(3, device=META, dtype=torch.int64)
        with RealNumbers():
            assert (whole / 2).dtype is torch.float32
            torch.set_default_dtype(torch.float64)
            try:
                assert (whole / 2).dtype is torch.float64
            finally:
                torch.set_default_dtype(torch.float32)

    def test_what_has_no_values_stays_where_it_is(self) -> None:
        with RealNumbers():
            moved = torch.empty(2, device=META).to("cpu")
        assert moved.device == META

    def test_without_it_nothing_is_real(self) -> None:
        assert torch.arange(4, device=META).device == META


class TestNoValues:
    def test_questions_about_values_are_answered(self) -> None:
        value = torch.empty(1, device=META)
        with NoValues():
            assert bool(value.any()) is True
            assert int(value) == 1
            assert 0 not in torch.empty(3, device=META)
            assert torch.empty(2, device=META).tolist() == [1, 1]

    def test_real_values_are_their_own(self) -> None:
        with NoValues():
            assert torch.tensor(3).item() == 3
            assert not torch.tensor(False)
            assert 3 in torch.tensor([3])
            assert torch.tensor([2, 5]).tolist() == [2, 5]

    @pytest.mark.parametrize("patches", [34, 40])
    def test_nothing_stays_in_the_caches_of_classes(self, patches: int) -> None:
        """BEiT keeps how far patches are apart; of so many a pass without data has no numbers."""
        config = hf.BeitConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=2 * patches,
            patch_size=2,
            use_relative_position_bias=True,
        )
        torch.manual_seed(0)
        model = hf.BeitModel(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                nn.init.normal_(parameter)
        without = without_data(hf.BeitModel, config)
        assert observe(without).ended
        pixels = torch.randn(1, 3, 2 * patches, 2 * patches)
        with torch.no_grad():
            with without_caches():
                expected = model(pixels).last_hidden_state
            assert torch.equal(model(pixels).last_hidden_state, expected)


def test_experts_that_the_router_chooses_are_all_seen() -> None:
    config = hf.MixtralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    config._experts_implementation = "eager"
    model = without_data(hf.MixtralForCausalLM, config)
    assert not isinstance(model, Refusal)
    seen = observe(model)
    assert seen.ended
    assert seen.heads["model.layers.1.self_attn.q_proj"] == ((4, 8),)  # behind the first experts
