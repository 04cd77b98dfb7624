"""Training, report, resume and drawing away from the CPU: on a stand-in, and on a real device.

The stand-in poses as a Mac's GPU: its tensors mix with no others, have no float64, and take no
operator that PyTorch lacks on the CPU, on CUDA or on MPS. Inside, all is done on the CPU.
"""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from helpers import EVERYTHING, interruption, train_small, write_checkpoint, write_photograph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import vae_training
from vae.run import Stopped
from vae.vae import VAE
from vae_inference import main

CPU = torch.device("cpu")
DEVICE = torch.device("mps:0")  # without a number PyTorch would ask a driver for it
BACKENDS = {"CPU", "CUDA", "MPS"}

OPTIONS = {
    "gaussian": {"crop": True, "beta_schedule": "cyclical", "cycles": 1},
    "everything": EVERYTHING,
}
COMMANDS = (
    *("similar a.png b.jpg --count 2", "sample --count 3", "sample --from prior --count 3"),
    *("interpolate a.png b.jpg --crop --steps 3", "traverse a.png --steps 3"),
    *("explore", "explore a.png", "sample --checkpoint unfinished.pt"),
)
REFUSED = {
    "add.Tensor is called with tensors on two devices": lambda x: x + torch.eye(3),
    "index.Tensor is called with tensors on two devices": lambda x: x[torch.tensor([0])],
    "MPS has no float64": lambda x: x.double(),
    "linalg_eig has no kernel for MPS": torch.linalg.eigvals,
    "linalg_qr has no such kernel for MPS in PyTorch 2.9": torch.linalg.qr,
}


def find_kernels() -> dict[str, set[str]]:
    """Return which of ``BACKENDS`` each of PyTorch's operators works on, by the operator's name."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    kernels, delegates = {}, {}
    for entry in re.split(r"^- func: ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
        name = entry.split("(")[0]
        lines = re.findall(r"^    (\w[\w, ]*):", entry, flags=re.M)  # what is below "dispatch:"
        keys = {key for line in lines for key in line.split(", ")}
        if delegate := re.search(r"^  structured_delegate: (\S+)", entry, flags=re.M):
            delegates[name] = delegate[1]
        elif not keys or any(key.startswith("Composite") for key in keys):
            keys = BACKENDS  # it is made of other operators
        kernels[name] = keys | ({"CPU", "CUDA"} if "ufunc_inner_loop:" in entry else set())
    return kernels | {name: kernels[name] | kernels[delegates[name]] for name in delegates}


class OnDevice(Tensor):
    """A tensor on the stand-in; ``inner``, on the CPU, has its values."""

    device, is_meta = DEVICE, False  # the C++ side of PyTorch takes it for one on "meta"
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = None  # StandIn does it

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        if inner.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        how = {"strides": inner.stride(), "dtype": inner.dtype, "device": "meta"}
        tensor = Tensor._make_wrapper_subclass(cls, inner.shape, **how)
        tensor.inner = inner
        return tensor

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def __format__(self, how: str) -> str:
        return format(self.inner, how)

    def tolist(self) -> Any:
        return self.inner.tolist()


class StandIn(TorchDispatchMode):
    """The stand-in device: it is there inside of ``with StandIn():``."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.copies = find_kernels(), 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None) -> Any:
        named = dict(named or {})
        target = named.get("device") or (DEVICE if OnDevice in types else CPU)
        if OnDevice not in types and target == CPU:
            return operator(*arguments, **named)
        tensors = [each for each in tree_leaves((arguments, named)) if isinstance(each, Tensor)]
        self.check(operator.name()[6:], arguments, {type(each) for each in tensors})  # no "aten::"
        named |= {"device": CPU} if "device" in named else {}
        known = {id(getattr(each, "inner", each)): each for each in tensors}
        arguments, named = tree_map_only(OnDevice, lambda x: x.inner, (arguments, named))
        result = operator(*arguments, **named)
        if target == CPU:
            return result
        # What was changed in place stays the tensor that it was.
        return tree_map_only(Tensor, lambda x: known.setdefault(id(x), OnDevice(x)), result)

    def check(self, name: str, arguments: tuple[Any, ...], kinds: set[type]) -> None:
        """Refuse what a real device refuses; count what is copied to it."""
        if len(kinds) > 1 and name != "copy_":
            raise RuntimeError(f"{name} is called with tensors on two devices")
        if missing := BACKENDS - self.kernels.get(name, set()):
            raise NotImplementedError(f"{name} has no kernel for {' and '.join(sorted(missing))}")
        if name == "linalg_qr" or (name == "grid_sampler_2d" and arguments[3]):  # with padding
            raise NotImplementedError(f"{name} has no such kernel for MPS in PyTorch 2.9")
        self.copies += kinds != {OnDevice} and bool(kinds)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Let ``--device auto`` be the stand-in."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip("the stand-in leans on PyTorch's internals, as 2.14 has them")
    with pytest.MonkeyPatch.context() as patch, StandIn() as device:
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: DEVICE)
        patch.setattr(torch.mps, "get_rng_state", lambda _: None)
        patch.setattr(torch.mps, "set_rng_state", lambda *_: None)
        # From 2.15 on each optimiser asks the device whether it records a graph.
        asks = "_accelerator_graph_capture_health_check"
        patch.setattr(torch.optim.Optimizer, asks, lambda _: None, raising=False)
        patch.setattr(torch, "inference_mode", torch.no_grad)  # it would hide what is called
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor hides nothing either
        try:
            yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def train(folder: Path, device: str, **options: Any) -> dict[str, Any]:
    """Train for an epoch, stop, go on to the end; return the metrics, and the pictures' bytes."""
    with interruption(signal.SIGINT), pytest.raises(Stopped):
        train_small(folder, device=device, **options)
    metrics = train_small(folder, resume=True, device=device, **options)
    metrics |= {"seconds": None, "options": None}
    return metrics | {path.name: path.read_bytes() for path in folder.glob("*.png")}


def draw(folder: Path, device: str) -> list[bytes]:
    """Return what each command draws."""
    with torch.random.fork_rng([]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.chdir(folder)
        model = VAE((8, 8), 2, 3, batch_norm=True)
        write_checkpoint(Path("runs/a/checkpoint.pt"), model)
        Path("runs/a/metrics.json").write_text("{}")  # as of a run that has ended
        write_checkpoint(Path("unfinished.pt"), model, fitted=False)
        write_photograph(Path("a.png"))
        write_photograph(Path("b.jpg"), (31, 77), seed=1)
        for line in COMMANDS:
            main([*line.split(), "--device", device, "--log-dir", "runs", "--output", line])
        return [Path(line).read_bytes() for line in COMMANDS]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_on_a_stand_in_device_is_the_run_on_the_cpu(tmp_path, monkeypatch, options):
    monkeypatch.setattr(vae_training, "VALIDATE_EVERY", 2)
    home = train(tmp_path / "home", "cpu", **options)
    with stand_in():
        assert train(tmp_path / "away", "auto", **options) == home | {"device": str(DEVICE)}


def test_each_command_draws_on_a_stand_in_device_as_on_the_cpu(tmp_path):
    home = draw(tmp_path, "cpu")
    with stand_in():
        assert draw(tmp_path, "auto") == home


def test_each_epoch_copies_its_batches_to_the_device_and_nothing_else(tmp_path):
    copies = {}
    for epochs in (11, 12):  # which look at validation and keep moments of the story equally often
        with stand_in() as device:
            train_small(tmp_path / str(epochs), epochs=epochs, device="auto", augment=True)
        copies[epochs] = device.copies
    assert copies[12] - copies[11] == 3 + 1  # batches of training and of test pictures


@pytest.mark.parametrize("refusal", REFUSED)
def test_the_stand_in_refuses_what_a_device_refuses(refusal):
    with stand_in(), pytest.raises((RuntimeError, TypeError), match=refusal):
        REFUSED[refusal](torch.eye(3, device=DEVICE))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
def test_a_run_and_each_command_on_the_accelerator_of_this_machine(tmp_path):
    assert train(tmp_path / "run", "auto", **EVERYTHING)["device"] != "cpu"
    assert all(draw(tmp_path, "auto"))
