"""One update of the weights, eager or as a CUDA graph, with running totals."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.data import ImageSet
from lib.graph.watch import dtype_of
from lib.messages import check_choice
from lib.train import processes
from lib.train.recipe import Recipe, pick_layout


class Update:
    """Forward, loss, backward and step; loss and hits are summed on the device."""

    cheap_to_read = True
    images: ImageSet | None = None  # what the outputs must have room for

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        recipe: Recipe,
        precision: str,
        teacher: nn.Module | None = None,
    ):
        self.teacher = teacher
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self.device = next(model.parameters()).device
        self.layout = pick_layout(model, self.device)
        whole = dtype_of(model) == torch.float32  # nothing to cast otherwise
        self.autocast = whole and precision == "bfloat16"
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        norms = (m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine)
        self.scales = [m.weight for m in norms] if recipe.sparsity else []
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.seen = 0

    def start_epoch(self) -> None:
        """Forget the totals of the epoch before."""
        self.sums.zero_()
        self.seen = 0

    def set_rate(self, rate: float) -> None:
        """Set the learning rate, in place where it is the tensor that a graph reads."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Train on one batch: x [B, C, H, W], y [B]."""
        self.optimizer.zero_grad(set_to_none=True)
        self._train(x, y)
        self.seen += len(y)

    def totals(self, *, everywhere: bool = False) -> tuple[float, float, int]:
        """Mean loss and top-1 in percent since the epoch began, and images seen.

        Of this process, or `everywhere`, for which all of them must ask.
        """
        sums = torch.cat([self.sums, self.sums.new_tensor([self.seen])])
        if everywhere:
            processes.add(sums)
        loss, hits, seen = sums.tolist()
        return loss / max(seen, 1), 100 * (hits / max(seen, 1)), int(seen)

    def _train(self, x: Tensor, y: Tensor) -> None:
        with torch.autocast(
            self.device.type, torch.bfloat16, self.autocast, cache_enabled=False
        ):
            output = self.model(x.contiguous(memory_format=self.layout))
            told = self._ask_teacher(x)
        loss, logits = self._loss(output, y)
        if told is not None:
            share = self.recipe.distill
            loss = (1 - share) * loss + share * self._imitate(logits, told)
        loss.backward()
        processes.merge_gradients(self.trained, len(y))
        for scale in self.scales:
            if scale.grad is not None:
                scale.grad.add_(scale.detach().sign(), alpha=self.recipe.sparsity)
        self.optimizer.step()
        with torch.no_grad():
            hits = (logits.argmax(1) == y).sum()
            self.sums += torch.stack([loss.detach().double() * len(y), hits.double()])

    @torch.no_grad()
    def _ask_teacher(self, x: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        output = self.teacher(x.contiguous(memory_format=self.layout))
        return output[0] if isinstance(output, tuple) else output

    def _imitate(self, logits: Tensor, told: Tensor) -> Tensor:
        """T^2 KL(teacher || student) of the answers softened by T, in nats."""
        # T^2, for the slopes of softened answers are as much smaller
        heat = self.recipe.temperature
        own = F.log_softmax(at_least_float32(logits) / heat, 1)
        wanted = F.log_softmax(at_least_float32(told) / heat, 1)
        return heat**2 * F.kl_div(own, wanted, reduction="batchmean", log_target=True)

    def _loss(self, output, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy; auxiliary heads (GoogLeNet, Inception) with their weight."""
        outputs = list(output) if isinstance(output, tuple) else [output]
        if self.images and outputs[0].shape[1] < len(self.images.classes):
            count = len(self.images.classes)
            raise ValueError(
                f"{self.images.name} has {count} classes, the network ends in "
                f"{outputs[0].shape[1]} outputs"
            )
        smooth = self.recipe.label_smoothing
        losses = [
            F.cross_entropy(at_least_float32(out), y, label_smoothing=smooth)
            for out in outputs
            if out is not None
        ]
        extra = (self.recipe.aux_weight * loss for loss in losses[1:])
        return sum(extra, losses[0]), outputs[0]


def at_least_float32(output: Tensor) -> Tensor:
    """What a loss is computed from: 16 bits are too few for a sum over classes."""
    return output.float() if output.dtype.itemsize < 4 else output


class GraphUpdate(Update):
    """The same, captured once and replayed: no launch overhead, no waiting.

    A network that cannot be captured stays eager, which is said once, or is an error if
    capture is a `must`.
    """

    cheap_to_read = False
    WARMUP = 3  # batches trained eagerly, on a side stream as capture requires

    def __init__(self, *arguments, must: bool = False):
        super().__init__(*arguments)
        self.must, self.calls, self.eager = must, 0, False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.x = self.y = torch.empty(0)  # where the graph reads its batch

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Train on one batch, captured from the fourth on."""
        self.calls += 1
        if self.calls > self.WARMUP and self.graph is None and not self.eager:
            self._try_capture(x, y)
        if self.eager:
            return super().__call__(x, y)
        # a batch of another size, such as a last one, cannot go through the graph
        if self.graph is None or x.shape != self.x.shape:
            self._train_beside(x, y, watched=self.calls == self.WARMUP)
        else:
            self.x.copy_(x)
            self.y.copy_(y)
            self.graph.replay()
        self.seen += len(y)

    def _train_beside(self, x: Tensor, y: Tensor, *, watched: bool) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Once captured, the graph owns the gradients' memory: they stay where they are.
        self.optimizer.zero_grad(set_to_none=self.graph is None)
        with torch.cuda.stream(stream):
            if not watched:
                self._train(x, y)
            elif _waits(lambda: self._train(x, y)):
                self._give_up("it waits for the GPU within a step")
        torch.cuda.current_stream().wait_stream(stream)

    def _try_capture(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(), y.clone()
        self.optimizer.zero_grad(set_to_none=True)
        states = self.model.state_dict(), self.optimizer.state_dict(), self.sums
        before = copy.deepcopy(states)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._train(self.x, self.y)
            self.graph = graph
        except Exception as error:  # CUDA, torch and the network raise many kinds
            self.model.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            self.sums.copy_(before[2])
            self._give_up(f"{type(error).__name__}: {error}".splitlines()[0], error)

    def _give_up(self, reason: str, error: Exception | None = None) -> None:
        if self.must:
            raise ValueError(
                f"cuda_graph=True: the training step cannot be captured ({reason})"
            ) from error
        print(f"no CUDA graph, the step runs eagerly: {reason}")
        self.eager = True


def _waits(train) -> bool:
    """Whether the call makes the host wait for the GPU: no capture survives that."""
    # Asked before capturing, because a capture that failed half-way leaves CUDA's
    # allocator and generators in its own mode.
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("synchronizing CUDA operation" in str(w.message) for w in caught)


def make_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    precision: str,
    *,
    cuda_graph: bool | str,
    teacher: nn.Module | None = None,
    images: ImageSet | None = None,
) -> Update:
    """The update for the model's device: captured on a GPU, unless not wanted.

    The outputs must have room for the classes of `images`.
    """
    check_choice("cuda_graph", cuda_graph, ("auto", True, False))
    on_gpu = next(model.parameters()).device.type == "cuda"
    if cuda_graph is True and not on_gpu:
        raise ValueError("cuda_graph=True needs a GPU")
    # Were one process not able to capture its step, the others would wait in theirs.
    several = processes.count() > 1
    if cuda_graph is True and several:
        raise ValueError(
            f"cuda_graph=True: {processes.count()} processes step eagerly; leave it out"
        )
    if not on_gpu or not cuda_graph or several:
        made = Update(model, optimizer, recipe, precision, teacher)
    else:
        must = cuda_graph is True
        made = GraphUpdate(model, optimizer, recipe, precision, teacher, must=must)
    made.images = images
    return made
