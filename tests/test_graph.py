"""The trace: hand-written groups, reasons, pairs; Torch-Pruning as a second view."""

import pytest
import torch
from torch import nn

from lib import models, surgery
from lib.graph import build_graph


def groups_of(name, shape=(3, 64, 64), **options):
    return surgery.channel_groups(models.build(name, **options), shape)


def group_with(groups, layer):
    return next(g for g in groups if layer in g.layers)


def test_resnet20_has_a_stream_per_stage_and_nine_inner_layers():
    """A zero-padded shortcut hands on what the wider stream keeps."""
    groups = groups_of("resnet20", (3, 32, 32))
    for stage, before, width in ((1, ["conv1"], 16), (2, [], 32), (3, [], 64)):
        stream = group_with(groups, f"layer{stage}.0.conv2")
        assert stream.layers == (
            *before,
            *(f"layer{stage}.{b}.conv2" for b in range(3)),
        )
        assert stream.size == width and stream.joined == set(stream.layers)
        inner = [group_with(groups, f"layer{stage}.{b}.conv1") for b in range(3)]
        assert [len(g.layers) for g in inner] == [1, 1, 1]
        assert {g.size for g in inner} == {width}


def test_resnet20_b_has_a_stream_per_stage():
    groups = groups_of("resnet20_b", (3, 32, 32))
    for stage, before, width in ((1, ["conv1"], 16), (2, [], 32), (3, [], 64)):
        stream = group_with(groups, f"layer{stage}.0.conv2")
        ends = {f"layer{stage}.{b}.conv2" for b in range(3)}
        shortcut = [f"layer{stage}.0.shortcut"] if stage > 1 else []
        assert set(stream.layers) == ends | {*before, *shortcut}
        assert stream.size == width


@pytest.mark.parametrize("name", ["densenet40", "lenet", "googlenet", "vgg16_bn"])
def test_without_additions_every_layer_is_its_own_group(name):
    shape = (3, 28, 28) if name == "lenet" else (3, 64, 64)
    groups = groups_of(name, shape)
    assert all(len(g.layers) == 1 and not g.joined for g in groups)
    assert [g.layers[0] for g in groups if g.fixed] == [groups[-1].layers[0]]


def test_mobilenet_ties_expansion_and_depthwise():
    groups = groups_of("mobilenet_v2")
    block = "features.3.conv"
    inner = group_with(groups, f"{block}.0.0")
    assert inner.layers == (f"{block}.0.0", f"{block}.1.0") and inner.size == 144
    stream = group_with(groups, f"{block}.2")
    assert stream.layers == ("features.2.conv.2", "features.3.conv.2")
    assert stream.joined == set(stream.layers)


def test_groups_cover_every_layer_once():
    model = models.build("googlenet", aux_logits=True, init_weights=False)
    names = [n for g in surgery.channel_groups(model, (3, 64, 64)) for n in g.layers]
    layers = {
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    assert len(names) == len(set(names)) and set(names) == layers


def test_grouped_convolutions_divide_units_into_blocks():
    group = group_with(groups_of("resnext50_32x4d"), "layer1.0.conv2")
    assert {"layer1.0.conv1", "layer1.0.conv2"} & set(group.layers)
    blocks = group.unit_blocks
    assert len(blocks) == 32 and {len(b) for b in blocks} == {4}


def test_reasons_name_the_outputs():
    groups = groups_of("resnet8", (3, 32, 32))
    assert group_with(groups, "linear").fixed == "they are the outputs of the network"
    assert all(g.fixed is None for g in groups if "linear" not in g.layers)


def test_pairs_of_convolution_and_norm():
    graph = build_graph(models.build("resnet8"), (3, 32, 32))
    assert len(graph.pairs) == 7 and graph.pairs["layer2.0.conv2"] == "layer2.0.bn2"
    assert graph.pairs["conv1"] == "bn1" and "linear" not in graph.pairs
    dense = build_graph(models.build("densenet40"), (3, 32, 32))
    assert "block1.0.conv" not in dense.pairs


@pytest.mark.parametrize("name", ["resnet20", "shufflenet_v2_x1_0", "convnext_tiny"])
def test_two_traces_agree(name):
    shape = (3, 64, 64)
    model = models.build(name)
    first, second = (surgery.channel_groups(model, shape) for _ in range(2))
    assert [g.layers for g in first] == [g.layers for g in second]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.blocks, b.blocks) and a.fixed == b.fixed
        assert all(torch.equal(i, b.index[n]) for n, i in a.index.items())


def test_a_layer_whose_weight_is_computed_is_named():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.Conv2d(4, 2, 1),
    )
    group = group_with(surgery.channel_groups(model, (3, 4, 4)), "0")
    assert "'1'" in group.fixed and "convolution" in group.fixed


def test_a_shape_that_does_not_run_names_the_layer():
    with pytest.raises(ValueError, match=r"\(3, 40, 40\) failed in 'ip1' \(Linear\)"):
        groups_of("lenet", (3, 40, 40))
    with pytest.raises(ValueError, match=r"'conv1' \(Conv2d\)"):
        groups_of("resnet8", (1, 32, 32))


@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny"])
def test_transformers_trace_and_free_their_hidden_layers(name):
    free = [g.layers for g in groups_of(name) if not g.fixed]
    assert sum(len(layers) == 1 for layers in free) >= 12


# -- Torch-Pruning's view --------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_removed_channels_agree_with_torch_pruning(name):
    tp = pytest.importorskip("torch_pruning")
    model = models.build(name).eval()
    x = torch.zeros(1, 3, 64, 64)
    theirs = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {m: n for n, m in model.named_modules()}
    groups = [g for g in surgery.channel_groups(model, (3, 64, 64)) if not g.fixed]
    assert len(groups) > 10
    for group in groups[:: max(1, len(groups) // 8)]:
        root = model.get_submodule(group.layers[0])
        prune = tp.prune_conv_out_channels
        if isinstance(root, nn.Linear):
            prune = tp.prune_linear_out_channels
        closure = theirs.get_pruning_group(root, prune, idxs=[0, 3])
        found = {
            names[item.dep.target.module]: sorted(item.idxs)
            for item in closure
            if item.dep.handler
            in (
                tp.prune_conv_out_channels,
                tp.prune_linear_out_channels,
                tp.prune_depthwise_conv_out_channels,
            )
        }
        units = group.index[group.layers[0]][[0, 3]]
        ours = {
            n: torch.nonzero(torch.isin(i, units)).flatten().tolist()
            for n, i in group.index.items()
        }
        assert found == ours
