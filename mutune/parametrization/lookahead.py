"""Whether a torch scheduler keeps the ratios between groups: it is run ahead on a stand-in, and judged by its kind."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from mutune.parametrization.finding import Finding, common_ratio, same

#: A tensor of a group and its planned peak rate.
Peak = tuple[str, float]

#: Steps that are run ahead. Audits at intervals below it see every rate before it is used.
STEPS = 1000

#: Attributes that hold rates in the unit of the learning rate, so that a plan needs one per group, as its peaks are.
ABSOLUTE = ("eta_min", "min_lrs", "max_lrs", "base_lrs")
#: The same in the optimizer's groups, where some schedulers keep them.
ABSOLUTE_IN_GROUPS = {lr_scheduler.OneCycleLR: ("max_lr", "min_lr"), SWALR: ("swa_lr",)}
#: What mends it.
CURES = {"eta_min": "leave eta_min at 0, or decay to a share of the peak with a LambdaLR"}
PER_GROUP = "give it one value per group, all in proportion to the peaks"
#: Rates below this part of their peak have lost their digits to underflow and say nothing about ratios.
VANISHED = 1e-30


def rates_ahead(
    scheduler: Any, optimizer: Optimizer, peaks: Sequence[Peak | None], *, simulate: bool = True
) -> Iterator[Finding]:
    """Findings about the rates that a scheduler will set.

    Neither the scheduler nor the optimizer is touched: a copy, nested schedulers included, is bound to a stand-in with
    the same groups. Only what is shared by every shallow copy is not guarded: a function that changes its own globals.
    A floor or a peak given as one rate for groups of different peaks is a finding even where it lies further ahead.

    Args:
        peaks: for each group a planned tensor and its peak rate, None where the plan has none of its tensors.
        simulate: whether the rates now in force have the plan's ratios; otherwise only the kind is judged.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "optimizer", None) is not optimizer:
        why = "the rates that it sets go nowhere"
        yield Finding("optimizer", f"scheduler {name}", "of this optimizer", "of another", why)
        return
    kinds = list(_absolute(scheduler, optimizer, peaks))
    yield from kinds
    if simulate and not kinds:
        yield from _simulated(scheduler, optimizer, peaks)


def _absolute(scheduler: Any, optimizer: Optimizer, peaks: Sequence[Peak | None]) -> Iterator[Finding]:
    """Rates of a scheduler, or of one inside it, that do not follow the peaks of the groups; the first of each."""
    for part in _parts(scheduler):
        in_groups = next((keys for kind, keys in ABSOLUTE_IN_GROUPS.items() if isinstance(part, kind)), ())
        settings: dict[str, Any] = {key: [group[key] for group in optimizer.param_groups] for key in in_groups}
        settings |= {key: vars(part)[key] for key in ABSOLUTE if key in vars(part)}
        for key, value in settings.items():
            off = _off(value if isinstance(value, list) else [value] * len(peaks), peaks)
            if off is not None:
                why = f"it erases the ratios between the groups' rates, so {CURES.get(key, PER_GROUP)}"
                yield Finding(off[0], f"{type(part).__name__}'s {key}", off[1], off[2], why)
                break


def _simulated(scheduler: Any, optimizer: Optimizer, peaks: Sequence[Peak | None]) -> Iterator[Finding]:
    """The first step ahead at which a group leaves the common factor."""
    if any(isinstance(part, lr_scheduler.ReduceLROnPlateau) for part in _parts(scheduler)):
        return  # it waits for a metric; one factor for all and floors in proportion, it keeps the ratios
    if any(_over(part) for part in _parts(scheduler)):
        return
    stand_in = _stand_in(optimizer)
    shadow = _shadow(scheduler, stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the stand-in's own step is never called
        for step in range(1, STEPS + 1):
            try:
                shadow.step()
            except Exception as error:
                if step == 1:
                    why = "it cannot be run ahead; audit without scheduler=, and its rates are seen as they come"
                    yield Finding("optimizer", f"scheduler {type(scheduler).__name__}", "a step", repr(error), why)
                return  # its horizon ends here
            rates = [group["lr"] for group in stand_in.param_groups]
            off = None if _vanished(rates, peaks) else _off(rates, peaks)
            if off is not None:
                tensor, wanted, found = off
                quantity = f"{type(scheduler).__name__}'s learning rate in {step} step{'s' if step > 1 else ''}"
                yield Finding(tensor, quantity, wanted, found, "it changes the ratios between the groups' rates")
                return


def _off(rates: Sequence[Any], peaks: Sequence[Peak | None]) -> tuple[str, float, float] | None:
    """(tensor, expected, found) of the first group whose rate is not its peak times the factor of most groups."""
    known = [(*peak, float(rate)) for rate, peak in zip(rates, peaks, strict=True) if peak is not None]
    shared = common_ratio(rate / peak for _, peak, rate in known)
    return next(((name, peak * shared, rate) for name, peak, rate in known if not same(rate / peak, shared)), None)


def _vanished(rates: Sequence[Any], peaks: Sequence[Peak | None]) -> bool:
    return all(float(rate) < VANISHED * peak[1] for rate, peak in zip(rates, peaks, strict=True) if peak is not None)


def _parts(scheduler: Any) -> Iterator[Any]:
    """The scheduler and those inside it (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for value in vars(scheduler).values():
        for inner in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(inner, lr_scheduler.LRScheduler):
                yield from _parts(inner)


def _over(scheduler: Any) -> bool:
    return isinstance(scheduler, lr_scheduler.OneCycleLR) and scheduler.last_epoch >= scheduler.total_steps


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the same groups, each of one dummy parameter."""
    stand_in = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(()))], "lr": 0.0} for _ in optimizer.param_groups])
    for mine, theirs in zip(stand_in.param_groups, optimizer.param_groups, strict=True):
        mine.update({key: _copied(value, stand_in) for key, value in theirs.items() if key != "params"})
    return stand_in


def _shadow(scheduler: Any, stand_in: Optimizer) -> Any:
    """The scheduler with copies of everything that it keeps, bound to the stand-in."""
    shadow = object.__new__(type(scheduler))
    shadow.__dict__.update({key: _copied(value, stand_in) for key, value in vars(scheduler).items()})
    return shadow


def _copied(value: Any, stand_in: Optimizer) -> Any:
    if isinstance(value, Optimizer):
        return stand_in
    if isinstance(value, lr_scheduler.LRScheduler):
        return _shadow(value, stand_in)
    if isinstance(value, Tensor):  # in double precision, so that a thousand roundings do not look like another ratio
        return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(inner, stand_in) for inner in value)
    try:
        return copy.copy(value)
    except TypeError:  # a weak reference to a method, which the two may share
        return value
