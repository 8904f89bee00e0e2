"""One training step, eager or as a CUDA graph, with running totals on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.train.recipe import Recipe


class EagerStep:
    """Forward, loss, backward and update; loss and hits are summed on the device."""

    cheap_to_read = True

    def __init__(self, model: nn.Module, optimizer, recipe: Recipe, precision: str):
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self.device = next(model.parameters()).device
        self.autocast = precision == "bfloat16"
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.seen = 0

    def start_epoch(self) -> None:
        """Forget the totals of the epoch before."""
        self.sums.zero_()
        self.seen = 0

    def set_rate(self, rate: float) -> None:
        """Set the learning rate; a rate held as a tensor is filled in place."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Train on one batch: x [B, C, H, W], y [B]."""
        self.optimizer.zero_grad(set_to_none=True)
        self._step(x, y)
        self.seen += len(y)

    def totals(self) -> tuple[float, float, int]:
        """Mean loss and top-1 in percent since the epoch began, and images seen."""
        loss, hits = (self.sums / max(self.seen, 1)).tolist()
        return loss, 100 * hits, self.seen

    def _step(self, x: Tensor, y: Tensor) -> None:
        with torch.autocast(
            self.device.type, torch.bfloat16, self.autocast, cache_enabled=False
        ):
            output = self.model(x)
        loss, logits = self._loss(output, y)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            hits = (logits.argmax(1) == y).sum()
            self.sums += torch.stack([loss.detach().double() * len(y), hits.double()])

    def _loss(self, output, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy; auxiliary heads (GoogLeNet, Inception) with their weight."""
        outputs = list(output) if isinstance(output, tuple) else [output]
        smooth = self.recipe.label_smoothing
        losses = [
            F.cross_entropy(_at_least_float32(out), y, label_smoothing=smooth)
            for out in outputs
            if out is not None
        ]
        loss = losses[0]
        for extra in losses[1:]:
            loss = loss + self.recipe.aux_weight * extra
        return loss, outputs[0]


def _at_least_float32(output: Tensor) -> Tensor:
    return output.float() if output.dtype == torch.bfloat16 else output


class GraphStep(EagerStep):
    """The same step captured once and replayed: no launch overhead, no host sync.

    The first batches run eagerly on a side stream, as capture requires; they are real
    training steps. A batch of another size than the first also runs eagerly.
    """

    cheap_to_read = False
    WARMUP = 3

    def __init__(self, model: nn.Module, optimizer, recipe: Recipe, precision: str):
        super().__init__(model, optimizer, recipe, precision)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Train on one batch, captured from the fourth on."""
        if self.calls < self.WARMUP or (self.x is not None and x.shape != self.x.shape):
            self._run_beside(x, y)
        else:
            if self.graph is None:
                self._capture(x, y)
            self.x.copy_(x)
            self.y.copy_(y)
            self.graph.replay()
        self.calls += 1
        self.seen += len(y)

    def _run_beside(self, x: Tensor, y: Tensor) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if self.graph is None:
                self.optimizer.zero_grad(set_to_none=True)
            else:  # the graph owns the gradients' memory
                self.optimizer.zero_grad(set_to_none=False)
            self._step(x, y)
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(), y.clone()
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step(self.x, self.y)
