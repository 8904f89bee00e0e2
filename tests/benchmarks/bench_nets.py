"""Which of timm's nets can be pruned, and is the result exact? Beside it Torch-Pruning.

Run from the repository's root: `python tests/benchmarks/bench_nets.py [NET ...]`; needs
timm and torch-pruning. Every net is pruned to half of its MACs at timm's own input
size, or as far as its prunable part allows, by random scores and
`from_scores(..., skip_fixed=True)`, with random weights in float64. Two checks run on a
small image where the net takes one: the shrunk net against `surgery.mask` (random
statistics), and against the whole net with hooks that silence from outside what the
plan removes (neutral statistics, so that zero in is zero out). Torch-Pruning halves all
channels but the classifier's; its result is compared with the whole net whose layers
get zeros in the place of the channels that it removed.

Each side of each net runs in a process of its own with a limit of time and memory. The
rows go to nets.csv as they come; nets that stand there are skipped (`--again`: not).
`--table` prints the counts.
"""

import argparse
import collections
import copy
import csv
import multiprocessing
import resource
import sys
import time
import warnings
from pathlib import Path

import timm
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import oracle

from lib import baselines, cost, surgery
from lib import plan as plans
from lib.graph import build_graph

TABLE = Path(__file__).with_name("nets.csv")
COLUMNS = (
    "net side outcome prunable macs change error_mask error_hooks seconds reason "
    "theirs their_macs their_error their_seconds their_reason"
).split()
SECONDS, MEMORY = {"ours": 600, "theirs": 90}, 8 << 30  # of CPU time and bytes, a net
LAYERS = (nn.Conv2d, nn.Linear)
SIDES = (64, 96, 128)  # tried in this order, then timm's own
NETS = """
resnet18 resnet50d resnetv2_50 seresnet50 ecaresnet50d_pruned efficientnet_b0
efficientnet_b1_pruned tf_efficientnetv2_b0 mobilenetv3_large_100
mobilenetv4_conv_small mobilenetv4_hybrid_medium convnext_tiny convnextv2_atto
repvgg_a0 mobileone_s0 fastvit_t8 ghostnet_100 hrnet_w18_small dla34 dpn68
res2net50_26w_4s resnest14d skresnet18 selecsls42 vovnet39a ese_vovnet19b_dw
cspresnet50 cspdarknet53 darknet53 densenet121 inception_v3 inception_v4
inception_resnet_v2 xception41 nasnetalarge pnasnet5large regnetx_002 regnety_002
regnetz_b16 rexnet_100 tresnet_m nfnet_f0 dm_nfnet_f0 nf_resnet50 lcnet_050 tinynet_e
hardcorenas_a mnasnet_100 mixnet_s spnasnet_100 fbnetc_100 semnasnet_075
edgenext_xx_small efficientvit_b0 efficientformer_l1 mobilevit_xxs mobilevitv2_050
poolformer_s12 caformer_s18 convformer_s18 vit_tiny_patch16_224 deit_tiny_patch16_224
swin_tiny_patch4_window7_224 mixer_s32_224 levit_128s coatnet_nano_rw_224
maxvit_tiny_tf_224 inception_next_tiny rdnet_tiny starnet_s1 repghostnet_050
repvit_m0_9 hgnet_tiny hgnetv2_b0 test_resnet legacy_seresnet18 gernet_s botnet26t_256
halonet26t lambda_resnet26t eca_nfnet_l0 ghostnetv2_100 ghostnetv3_050
mobilenetv5_base resnet26t seresnext26d_32x4d bat_resnext26ts gcresnext26ts vgg11_bn
crossvit_tiny_240 visformer_tiny davit_tiny focalnet_tiny_srf hiera_tiny_224
tiny_vit_5m_224 efficientvit_m0 xcit_nano_12_p16_224 cait_xxs24_224 twins_pcpvt_small
pvt_v2_b0 fasternet_t0 shvit_s1 csatv2 mambaout_femto
""".split()


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The net with random weights in float64, and timm's input shape."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).double().eval()
    return model, tuple(model.default_cfg["input_size"])


def disturb(model: nn.Module, x: torch.Tensor, *, neutral: bool) -> None:
    """Random scales, shifts (unless neutral) and statistics, zero-initialised ones too.

    Statistics are those of `x` up to a random factor: else the signal would die on its
    way, and no error could be seen.
    """
    g = torch.Generator().manual_seed(0)
    oracle.roughen(model, 0, neutral=neutral)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for module in model.modules():
        for key, vector in module._parameters.items():
            if vector is not None and not vector.any() and vector.ndim > 1:
                vector.normal_(0, 0.05, generator=g)  # a head that starts at zero
            if isinstance(module, (*LAYERS, _BatchNorm)) or vector is None:
                continue
            if sum(n > 1 for n in vector.shape) <= 1:
                shift = key in ("bias", "beta")
                vector.uniform_(*((-0.3, 0.3) if shift else (0.5, 1.5)), generator=g)
                vector.mul_(0 if neutral and shift else 1)
            elif neutral and key != "weight":  # places and tokens are shifts as well
                vector.zero_()

    def adapt(module, args):
        power = args[0].square().transpose(0, 1).flatten(1).mean(1) + 1e-6
        module.running_var.mul_(power)
        module.running_mean.mul_(power.sqrt())

    handles = [
        m.register_forward_pre_hook(adapt) for m in norms if m.running_var is not None
    ]
    model(x)
    for handle in handles:
        handle.remove()


def find_side(model: nn.Module, shape: tuple) -> tuple[int, int, int]:
    """The smallest image that the net takes."""
    for side in SIDES:
        if side < shape[1]:
            try:
                build_graph(model, (shape[0], side, side))
                return shape[0], side, side
            except ValueError:
                continue
    return shape


def prune_ours(name: str) -> dict:
    """Outcome, shares and errors of one net."""
    model, shape = build(name)
    start = time.process_time()
    graph = build_graph(model, shape)
    scores = baselines.random(model, 0)
    full = cost.count(model, shape).macs

    def plan_of(**options):
        return plans.from_scores(
            model, scores, shape, skip_fixed=True, graph=graph, **options
        )

    def share(plan):
        small = surgery.shrink(model, plan, shape, graph=graph)
        return cost.count(small, shape).macs / full

    with torch.no_grad():
        least = share(plan_of(rate=0.99999))
        row = {"prunable": round(1 - least, 4), "reason": list_reasons(graph, model)}
        if least > 0.995:
            return row | {"outcome": "refused", "macs": 1}
        plan = plan_of(macs=max(0.5, 1.005 * least))
        row |= {"macs": round(share(plan), 4)}
        row |= {"seconds": round(time.process_time() - start, 1)}
        return (
            row
            | compare(model, plan, find_side(model, shape))
            | {"outcome": "half" if row["macs"] < 0.506 else "part"}
        )


def list_reasons(graph, model: nn.Module) -> str:
    """Why layers stay whole: for each reason one layer and how many there are."""
    fixed = {n: r for n, r in surgery.prunable(model, (), graph=graph).items() if r}
    kinds = collections.defaultdict(list)
    for name, reason in fixed.items():
        if "outputs of the network" not in reason:
            kinds[" ".join(w for w in reason.split() if "." not in w)].append(name)
    rows = sorted(kinds.values(), key=len, reverse=True)[:3]
    return "; ".join(f"{len(names)} x {fixed[names[0]]}" for names in rows)


def compare(model: nn.Module, plan: plans.Plan, shape: tuple) -> dict:
    """Errors relative to the largest output."""
    x = oracle.images(shape)
    graph = build_graph(model, shape)
    row = {"side": shape[1]}
    disturb(model, x, neutral=False)
    got = first(surgery.shrink(model, plan, shape, graph=graph)(x))
    masked = first(surgery.mask(model, plan, shape, graph=graph)(x))
    row["error_mask"] = f"{oracle.difference(got, masked):.1e}"
    row["change"] = f"{oracle.difference(got, first(model(x))):.1e}"
    disturb(model, x, neutral=True)
    got = first(surgery.shrink(model, plan, shape, graph=graph)(x))
    silence_mixers(model, graph, plan)
    with oracle.hooked(model, plan, x, behind=False):
        row["error_hooks"] = f"{oracle.difference(got, first(model(x))):.1e}"
    return row


def silence_mixers(model: nn.Module, graph, plan: plans.Plan) -> None:
    """What a norm over channels makes of zeros is read by nobody."""
    kept = plans.resolve(graph, plan)
    for name, move in graph.mixes.items():
        alive = kept.units[graph.unit_of(move.inputs)]

        def hook(module, args, y, alive=alive, dim=move.dim):
            layout = [1] * y.ndim
            layout[dim] = -1
            return y * alive.view(layout)

        model.get_submodule(name).register_forward_hook(hook)


def first(output):
    """The logits, of which some nets return several."""
    return output if isinstance(output, torch.Tensor) else torch.cat(output, -1)


# -- Torch-Pruning ---------------------------------------------------------------------


def prune_theirs(name: str) -> dict:
    """Half of all channels by Torch-Pruning: does it run, and is it exact?"""
    model, shape = build(name)
    side = find_side(model, shape)
    x = oracle.images(side)
    with torch.no_grad():
        disturb(model, x, neutral=True)
    small = copy.deepcopy(model)
    full = cost.count(model, side).macs
    names = {module: path for path, module in small.named_modules()}
    last = list(baselines.prunable_layers(model))
    heads = [m for n, m in small.named_modules()
             if isinstance(m, (nn.Conv2d, nn.Linear)) and n not in last]  # fmt: skip
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        small, x[:1], importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5, ignored_layers=heads,
    )  # fmt: skip
    gone = Gone(names)
    for group in pruner.step(interactive=True):
        gone.note(group)
        group.prune()
    row = {"their_seconds": round(time.process_time() - start, 1)}
    with torch.no_grad():
        got = first(small.eval()(x))
        row |= {"theirs": "runs"}
        row |= {"their_macs": round(cost.count(small, side).macs / full, 4)}
        if gone.unknown:  # its indices count something else than channels
            return row
        gone.silence(model)
        error = oracle.difference(got, first(model(x)))
    return row | {
        "their_error": f"{error:.1e}",
        "theirs": "exact" if error < 1e-10 else "off",
    }


class Gone:
    """The channels that Torch-Pruning removed, by their numbers in the whole net."""

    def __init__(self, names: dict):
        self.names, self.unknown = names, False
        out = ("out_channels", "prune_batchnorm")
        self.left: dict = {}
        self.sides = lambda f: "out" if any(k in f.__name__ for k in out) else "in"

    def note(self, group) -> None:
        """Before the group is pruned: its indices count what is there now."""
        for dep, idxs in group:
            module = dep.target.module
            if module not in self.names or not hasattr(module, "weight"):
                continue
            both = 1 < getattr(module, "groups", 1) == module.weight.shape[0]
            for side in ("in", "out") if both else (self.sides(dep.handler),):
                weight = module.weight
                if weight is None:
                    continue
                size = weight.shape[0]
                if side == "in":
                    size = getattr(module, "in_channels", weight.shape[-1])
                key = self.names[module], side
                left = self.left.setdefault(key, list(range(size)))
                drop = set(idxs)
                self.unknown |= max(drop) >= len(left)
                self.left[key] = [c for i, c in enumerate(left) if i not in drop]

    def silence(self, model: nn.Module) -> None:
        """Zeros in the place of what was removed, where a layer reads or makes it."""
        for (name, side), left in self.left.items():
            module = model.get_submodule(name)
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            if side == "out":
                module.register_forward_hook(lambda m, a, y, k=left: keep_only(m, y, k))
            else:
                module.register_forward_pre_hook(
                    lambda m, a, k=left: (keep_only(m, a[0], k), *a[1:])
                )


def keep_only(module: nn.Module, x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Zero elsewhere."""
    dim = -1 if isinstance(module, nn.Linear) else 1
    alive = torch.zeros(x.shape[dim], dtype=x.dtype)
    alive[kept] = 1
    return x * (alive if dim == -1 else alive.view(-1, 1, 1))


# -- one process per net and side ------------------------------------------------------


def run_child(side: str, name: str, answer) -> None:
    """Send a row, or why there is none; dies where time or memory do not suffice."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS[side],) * 2)
    try:
        row = prune_ours(name) if side == "ours" else prune_theirs(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        row = say_failed(side, reason)
    answer.send(row)


def say_failed(side: str, reason: str) -> dict:
    """The row of a side that came to no end."""
    if side == "ours":
        return {"outcome": "failed", "reason": reason}
    return {"theirs": "fails", "their_reason": reason}


def run_apart(side: str, name: str) -> dict:
    """One side of one net in a process of its own, forked: imports take seconds."""
    context = multiprocessing.get_context("fork")
    answer, end = context.Pipe(duplex=False)
    child = context.Process(target=run_child, args=(side, name, end))
    child.start()
    end.close()
    try:
        return answer.recv()
    except EOFError:
        child.join()
        return say_failed(side, f"ended with {child.exitcode} (time or memory)")
    finally:
        child.join()


def read_rows() -> dict[str, dict]:
    """The rows that are there, by net."""
    if not TABLE.exists():
        return {}
    with TABLE.open() as file:
        return {row["net"]: row for row in csv.DictReader(file)}


def write_rows(rows: dict[str, dict]) -> None:
    """All rows, in the order of the list."""
    order = {name: i for i, name in enumerate(NETS)}
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in sorted(rows, key=lambda n: order.get(n, len(order))):
            writer.writerow({c: rows[name].get(c, "") for c in COLUMNS})


def print_counts(rows: dict[str, dict]) -> None:
    """How many nets have which outcome, and which are not exact."""
    print(f"{len(rows)} nets")
    for key in ("outcome", "theirs"):
        print(key, dict(collections.Counter(r.get(key) or "-" for r in rows.values())))
    for name, row in rows.items():
        errors = [float(row.get(k) or 0) for k in ("error_mask", "error_hooks")]
        if max(errors) > 1e-10:
            print(f"  {name} is off by {max(errors):.1e}")


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("nets", nargs="*", default=NETS)
    parser.add_argument("--again", action="append_const", const=1, help="run anew")
    parser.add_argument("--only", choices=["ours", "theirs"], help="one side")
    parser.add_argument("--table", action="store_true", help="print the counts alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = read_rows()
    for name in () if options.table else options.nets:
        for side, key in (("ours", "outcome"), ("theirs", "theirs")):
            if options.only not in (None, side):
                continue
            if rows.get(name, {}).get(key) and not options.again:
                continue
            found = run_apart(side, name)
            rows = read_rows()
            old = {
                k: v for k, v in rows.get(name, {}).items()
                if k.startswith("their") == (side == "ours")
            }  # fmt: skip
            rows[name] = old | found | {"net": name}
            write_rows(rows)
            print(rows[name], flush=True)
    print_counts(rows)


if __name__ == "__main__":
    main()
