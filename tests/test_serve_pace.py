"""The host does not run away from the device."""

from serve.pace import Pace, pace_of


class Device:
    """Numbers its marks, and notes which of them were waited for."""

    def __init__(self) -> None:
        self.num_marks = 0
        self.waited_for: list[int] = []

    def record(self) -> "Mark":
        self.num_marks += 1
        return Mark(self, self.num_marks)


class Mark:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def synchronize(self) -> None:
        self.device.waited_for.append(self.number)


def test_the_host_is_at_most_two_steps_ahead():
    device = Device()
    pace = Pace(device.record)
    for step in range(1, 8):
        pace.step()
        ended = max(device.waited_for, default=0)
        assert step - ended <= 2
    assert device.waited_for == [1, 2, 3, 4, 5]  # each once, and never the newest: it would idle


def test_a_cpu_needs_no_pace():
    assert pace_of("cpu") is None
