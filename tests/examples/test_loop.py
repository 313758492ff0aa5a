import math

import pytest
import torch

from draftattn.errors import InputError
from examples.tiny_wan.loop import Budget, run_loop
from examples.tiny_wan.state import TrainingState


def _state() -> TrainingState:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    return TrainingState({"net": module}, {"adamw": optimizer}, {"noise": torch.Generator().manual_seed(1)})


def _stepper(state: TrainingState, killed_at: int | None = None):
    def step(share: float) -> torch.Tensor:
        if state.step == killed_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=state.generators["noise"])
        optimizer = state.optimizers["adamw"]
        optimizer.zero_grad()
        loss = state.modules["net"](x).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - share)
        optimizer.step()
        return loss.detach()

    return step


def test_a_killed_run_continues_with_the_same_numbers(tmp_path, capsys):
    straight = _state()
    run_loop("a", straight, Budget(iterations=12), _stepper(straight), tmp_path / "straight.safetensors")

    path = tmp_path / "killed.safetensors"
    killed = _state()
    with pytest.raises(KeyboardInterrupt):
        run_loop("b", killed, Budget(iterations=12), _stepper(killed, 7), path, seconds_between_checkpoints=0)
    resumed = _state()
    run_loop("b", resumed, Budget(iterations=12), _stepper(resumed), path)
    assert "continues at iteration 7" in capsys.readouterr().out
    assert resumed.step == 12
    for name, value in straight.modules["net"].state_dict().items():
        assert torch.equal(value, resumed.modules["net"].state_dict()[name])
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_finished_run_does_nothing(tmp_path):
    path = tmp_path / "state.safetensors"
    first = _state()
    run_loop("a", first, Budget(iterations=3), _stepper(first), path)
    again = _state()
    run_loop("a", again, Budget(iterations=3), _stepper(again, killed_at=3), path)
    assert torch.equal(again.modules["net"].weight, first.modules["net"].weight)


def test_time_already_spent_counts(tmp_path):
    path = tmp_path / "state.safetensors"
    state = _state()
    state.elapsed = 59.0
    state.save(path)
    resumed = _state()
    assert resumed.load(path)
    assert Budget(minutes=1).share(resumed.step, resumed.elapsed) == pytest.approx(59 / 60)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "state.safetensors"
    state = _state()
    state.save(path)
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match="iteration 1"):
        run_loop("a", state, Budget(iterations=5), lambda share: torch.tensor(math.nan), path, seconds_between_lines=0)
    assert path.read_bytes() == before


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    _state().save(path)
    other = TrainingState({"net": torch.nn.Linear(2, 2)}, {}, {})
    with pytest.raises(InputError, match="does not fit this recipe"):
        other.load(path)
    path.write_bytes(b"half")
    with pytest.raises(InputError, match="does not fit this recipe"):
        _state().load(path)


@pytest.mark.parametrize("values", [{}, {"minutes": 1.0, "iterations": 2}, {"minutes": 0.0}, {"iterations": -1}])
def test_a_budget_is_one_positive_number(values):
    with pytest.raises(InputError, match="a budget is"):
        Budget(**values)
