"""What must hold on a GPU, compared with the CPU or with plain PyTorch."""

import copy
import io
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from steps import Bench, Found, NotHere, apart, step
from torch import nn

from lib import baselines, cost, data, models, plan, surgery, train
from lib.data import ImageSet
from lib.graph import build_graph
from lib.kernels import dispatch, mix_norm_relu, mmd2

SHAPE = (3, 32, 32)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def make_images(count: int, seed: int = 0) -> ImageSet:
    """Ten classes of noisy patterns: something can be learnt, and is soon learnt."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.rand((10, 32, 32, 3), generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 10, (count,), generator=g)
    noise = torch.rand((count, 32, 32, 3), generator=g)
    pixels = (127 * patterns[labels] + 127 * noise).to(torch.uint8)
    names = tuple(map(str, range(10)))
    return ImageSet(pixels, labels, names, "noisy", (0.5,) * 3, (0.25,) * 3, 4, True)


def build(name: str, *, dtype=torch.float64) -> nn.Module:
    """A network whose norms do something: random scales, shifts and statistics."""
    torch.manual_seed(1)
    net = models.build(name, image_size=32)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5, generator=g)
                norm.bias.normal_(0, 0.3, generator=g)
                norm.running_mean.normal_(0, 0.3, generator=g)
                norm.running_var.uniform_(0.5, 2, generator=g)
    return net.to(dtype).eval()


def is_precise() -> None:
    """float32 as float32: no TF32 in the comparisons."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


# -- kernels -------------------------------------------------------------------------


def mix_by_hand(x, beta, weight, bias):
    real, knock = x.chunk(2)
    share = beta.view(-1, 1, 1)
    mixed = torch.cat([share * real + (1 - share) * knock, knock])
    return F.batch_norm(mixed, None, None, weight, bias, training=True).relu()


def mmd_by_hand(x, y, widths):
    def kernel(a, b):
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return sum(torch.exp(-squares.square() / (2 * s * s)) for s in widths)

    def within(a):
        found = kernel(a, a)
        return (found.sum() - found.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def differentiate(function, leaves, grad=None) -> list[torch.Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return [value, *torch.autograd.grad(value, leaves, grad)]


@step("check")
def mixing_kernel(bench: Bench):
    """mix_norm_relu and its gradients: BatchNorm of the mixed batch in float64."""
    if not dispatch.has_triton():
        raise NotHere("triton is not installed")
    shapes = [(4, 3, 5, 7), (6, 17, 8, 8)]
    if bench.on_gpu:
        shapes += [(256, 16, 32, 32), (128, 64, 8, 8), (32, 256, 14, 14), (6, 1, 9, 3)]
    for shape in shapes:
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = (2 * draw(*shape) + 3).to(dtype)
                vectors = [draw(shape[1], seed=k).to(torch.float32) for k in (1, 2, 3)]
                vectors[0] = vectors[0].sigmoid()
                # gradients where the ReLU is at its kink depend on rounding alone
                before = mix_by_hand(x.double(), *(v.double() for v in vectors))
                grad = draw(*shape, seed=5) * (before > 0.05)
                exact = differentiate(
                    mix_by_hand, [x.double(), *(v.double() for v in vectors)], grad
                )
                there = [x.to(bench.device).contiguous(memory_format=layout)]
                there += [v.to(bench.device) for v in vectors]
                ours = differentiate(
                    lambda *leaves: mix_norm_relu(*leaves, backend="triton"),
                    there,
                    grad.to(bench.device, dtype).contiguous(memory_format=layout),
                )  # fmt: skip
                worst = max(map(apart, ours, exact))
                name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {str(layout)[6:]}"
                yield Found(name, worst, limit=limit)


@step("check")
def mmd_kernel(bench: Bench):
    """mmd2 and its gradients against whole kernel matrices in float64."""
    if not dispatch.has_triton():
        raise NotHere("triton is not installed")
    sizes = [(20, 33, 5)]
    if bench.on_gpu:
        sizes += [(512, 300, 48), (2000, 2000, 768), (130, 4, 3072)]
    for n, m, d in sizes:
        x, y = draw(n, d), 0.5 + draw(m, d, seed=1)
        widths = [s * (2 * d) ** 0.5 for s in (0.5, 1.0, 4.0)]
        exact = differentiate(lambda a, b, w=widths: mmd_by_hand(a, b, w), [x, y])
        pair = [z.to(bench.device, torch.float32) for z in (x, y)]
        ours = differentiate(
            lambda a, b, w=widths: mmd2(a, b, w, backend="triton"), pair
        )
        yield Found(f"n={n} m={m} d={d}", max(map(apart, ours, exact)), limit=1e-3)


# -- surgery -------------------------------------------------------------------------

NETS = ("resnet20", "resnet56", "resnet20_b", "densenet40", "mobilenet_v2_cifar")


@step("check")
def surgery_of_nets(bench: Bench):
    """mask, shrink and a second shrink on the device: equal, and equal to the CPU."""
    is_precise()
    for name in NETS[: 2 if bench.small else None]:
        net = build(name)
        graph = build_graph(net, SHAPE)
        x = draw(2, *SHAPE)
        for residual in ("tie", "scatter", "keep"):
            cut = plan.from_scores(
                net, baselines.l1(net), SHAPE, rate=0.4, residual=residual,
                skip_fixed=True, graph=graph,
            )  # fmt: skip
            here = surgery.shrink(net, cut, SHAPE)
            there = copy.deepcopy(net).to(bench.device)
            masked = surgery.mask(there, cut, SHAPE)
            small = surgery.shrink(there, cut, SHAPE)
            x_there = x.to(bench.device)
            with torch.no_grad():
                outputs = [made(x_there) for made in (masked, small)]
                expected = here(x)
            worst = max(apart(output, expected) for output in outputs)
            yield Found(f"{name} {residual}", worst, limit=1e-9)
            state = {key: value.cpu() for key, value in small.state_dict().items()}
            here.load_state_dict(state)  # refuses another plan's
            with torch.no_grad():
                yield Found(f"{name} {residual}, state", apart(here(x), expected),
                            limit=1e-12)  # fmt: skip
        again = plan.from_scores(
            small,
            baselines.l1(small),
            SHAPE,
            rate=0.3,
            residual="keep",
            skip_fixed=True,
        )
        with torch.no_grad():
            pair = [f(small, again, SHAPE)(x_there) for f in
                    (surgery.mask, surgery.shrink)]  # fmt: skip
        yield Found(f"{name} twice", apart(*pair), limit=1e-9)


@step("check")
def counted_costs(bench: Bench):
    """cost.count of a network on the device: that of the CPU."""
    net = build("resnet20")
    here, there = cost.count(net, SHAPE), cost.count(net.to(bench.device), SHAPE)
    yield Found("MACs", abs(here.macs - there.macs), limit=0)
    yield Found("parameters", abs(here.params - there.params), limit=0)


# -- training ------------------------------------------------------------------------


@step("check")
def stream_of_batches(bench: Bench):
    """Crops, flips and normalisation: on the device as on the CPU, epoch by epoch."""
    images = make_images(200)
    for side in (None, 16):
        pairs = [
            list(
                data.batches(images, 64, train=True, epoch=3, device=d, resolution=side)
            )
            for d in (bench.device, "cpu")
        ]
        worst = max(
            apart(a, b) + float(not torch.equal(y.cpu(), z))
            for (a, y), (b, z) in zip(*pairs, strict=True)
        )
        yield Found(f"side {side or 32}", worst, limit=1e-5)


def train_briefly(images, device: str, **settings):
    torch.manual_seed(3)
    net = models.build("resnet8")
    history = train.fit(
        net, images, epochs=2, lr=0.02, batch_size=64, device=device,
        precision="float32", **settings,
    )  # fmt: skip
    return net, history.rows[-1]["loss"]


@step("check")
def training(bench: Bench):
    """Two epochs on the device lose what they lose on the CPU."""
    is_precise()
    images = make_images(640)
    found = [
        train_briefly(images, d, cuda_graph=False)[1] for d in (bench.device, "cpu")
    ]
    yield Found("loss", abs(found[0] - found[1]), "nats", limit=0.02)


@step("check")
def captured_step(bench: Bench):
    """A CUDA graph of the training step against the eager one."""
    if not bench.on_gpu:
        raise NotHere("a CUDA graph needs a GPU")
    is_precise()
    images = make_images(640)
    pair = [train_briefly(images, "cuda", cuda_graph=flag) for flag in (True, False)]
    yield Found("loss", abs(pair[0][1] - pair[1][1]), "nats", limit=0.01)
    states = [net.state_dict() for net, _ in pair]
    worst = max(apart(states[0][k], states[1][k].float()) for k in states[0]
                if states[0][k].is_floating_point())  # fmt: skip
    yield Found("weights and statistics", worst, limit=0.05)


@step("check")
def resumed_training(bench: Bench):
    """Killed after the first of two epochs and taken up: the same loss."""
    is_precise()
    images = make_images(640)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.pt"

        def stop(net, seen=[]):  # noqa: B006, one list for both epochs is the point
            seen.append(0)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return {}

        try:
            train_briefly(images, bench.device, checkpoint=file, watch=stop)
        except KeyboardInterrupt:
            pass
        _, taken_up = train_briefly(images, bench.device, checkpoint=file)
    _, whole = train_briefly(images, bench.device)
    yield Found("loss", abs(taken_up - whole), "nats", limit=0.01)


@step("check")
def evaluation(bench: Bench):
    """Accuracy, hits and recalibrated statistics: on the device as on the CPU."""
    is_precise()
    images, net = make_images(300), build("resnet20", dtype=torch.float32)
    there = copy.deepcopy(net).to(bench.device)
    for made in (net, there):
        train.recalibrate(made, images, num_batches=4, batch_size=64)
    pair = [train.evaluate(made, images) for made in (net, there)]
    yield Found("top-1", abs(pair[0]["top1"] - pair[1]["top1"]), "points", limit=1.0)
    yield Found("loss", abs(pair[0]["loss"] - pair[1]["loss"]), "nats", limit=0.01)
    hits = [train.find_hits(made, images) for made in (net, there)]
    yield Found("hits", int((hits[0] != hits[1].cpu()).sum()), "images", limit=3)
    file = io.BytesIO()
    torch.save(there.state_dict(), file)
    file.seek(0)
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


# -- scores --------------------------------------------------------------------------


def import_scores():
    try:
        from lib import criteria, nisp, scop
    except ImportError as error:
        raise NotHere(str(error)) from error
    return criteria, nisp, scop


@step("check")
def scores(bench: Bench):
    """Every criterion that needs no training: the order of the CPU's scores."""
    is_precise()
    _, nisp, _ = import_scores()
    images, net = make_images(400), build("resnet20", dtype=torch.float32)
    there = copy.deepcopy(net).to(bench.device)
    for name in ("l1", "bn_scale", "nisp", "nisp-norm", "nisp-mag", "layerwise"):
        pair = [
            nisp.score_layers(name, made, images, num_images=200)
            for made in (net, there)
        ]
        yield Found(name, compare_scores(*pair), limit=1e-3)
    for name, score in (
        ("fpgm", baselines.fpgm),
        ("taylor", lambda made: baselines.taylor(made, images, num_images=200)),
    ):
        yield Found(name, compare_scores(score(net), score(there)), limit=1e-3)


def compare_scores(here: dict, there: dict) -> float:
    return max(apart(there[layer], here[layer]) for layer in here)


@step("check")
def worth_of_channels(bench: Bench):
    """The rise of the loss when a channel is silenced: as the CPU measures it."""
    is_precise()
    criteria, _, _ = import_scores()
    images = make_images(20 if bench.small else 200)
    net = build("resnet8", dtype=torch.float64)
    graph = build_graph(net, SHAPE)
    layers = list(graph.pairs)[1:3]
    there = copy.deepcopy(net).to(bench.device)
    pair = [
        criteria.measure_truth(made, images, layers, graph=graph)
        for made in (net, there)
    ]
    yield Found("rise", compare_scores(*pair), limit=1e-6)


@step("check")
def selection(bench: Bench):
    """SCOP's beta after four steps: as on the CPU, but for steps of undecided sign."""
    is_precise()
    _, _, scop = import_scores()
    images, recipe = make_images(256), train.Recipe(
        1, lr=0.004, batch_size=64, optimizer="adam", precision="float32")  # fmt: skip
    found = []
    for device in ("cpu", bench.device):
        net = build("resnet8", dtype=torch.float32).to(device)
        arm = scop.build_control("shuffle", images, device=device)
        found.append(scop.select(net, images, arm, recipe=recipe, device=device))
    here, there = found
    off = torch.cat([(there[k].cpu() - here[k].cpu()).abs() for k in here])
    yield Found("share of betas off by .001", float((off > 1e-3).double().mean()),
                "share", limit=0.05)  # fmt: skip
