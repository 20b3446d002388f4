"""The systemd unit, against the settings and the user that it is installed with."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from config.table import SETTINGS
from supervisor.status.metric_table import METRICS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DEFAULTS = {setting.name: setting.default for setting in SETTINGS}


@pytest.fixture(scope="module")
def service() -> dict[str, list[str]]:
    """Return name -> values of the unit's [Service] section."""
    found = defaultdict(list)
    section = None
    for line in (DEPLOY / "planner.service").read_text().splitlines():
        if line.startswith("["):
            section = line
        elif line and not line.startswith("#") and section == "[Service]":
            name, _, value = line.partition("=")
            found[name].append(value)
    return dict(found)


def test_the_service_tells_systemd_when_it_is_ready_and_alive(service: dict[str, list[str]]) -> None:
    assert service["Type"] == ["notify"]
    assert service["NotifyAccess"] == ["main"]
    assert int(service["WatchdogSec"][0]) > 0


def test_systemd_starts_the_command_of_its_own_environment(service: dict[str, list[str]]) -> None:
    assert service["ExecStart"] == ["/opt/loadmaster/.venv/bin/planner serve"]


def test_systemd_waits_longer_than_a_full_drain_and_stop_take(service: dict[str, list[str]]) -> None:
    assert service["KillMode"] == ["mixed"]
    assert int(service["TimeoutStopSec"][0]) > DEFAULTS["DRAIN_TIMEOUT"] + 3 * DEFAULTS["STOP_GRACE"]


def test_a_runner_killed_for_want_of_memory_does_not_stop_the_service(service: dict[str, list[str]]) -> None:
    assert service["OOMPolicy"] == ["continue"]


@pytest.mark.parametrize(
    "name", ["PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute", "ProcSubset"]
)
def test_nothing_that_takes_the_gpus_away_is_set(service: dict[str, list[str]], name: str) -> None:
    assert name not in service


def test_the_user_and_groups_are_made_by_sysusers(service: dict[str, list[str]]) -> None:
    (user,) = service["User"]
    made = [line.split() for line in (DEPLOY / "loadmaster.sysusers").read_text().splitlines()]
    assert any(fields[:2] == ["u", user] for fields in made)
    for group in service["SupplementaryGroups"][0].split():
        assert ["m", user, group] in made


def test_the_example_names_only_settings_that_exist() -> None:
    named = re.findall(r"^#?PLANNER_(\w+)=", (DEPLOY / "planner.env").read_text(), re.MULTILINE)
    assert named
    assert set(named) <= set(DEFAULTS)


def test_alerts_watch_metrics_that_exist() -> None:
    watched = set(re.findall(r"loadmaster_\w+", (DEPLOY / "alerts.yml").read_text()))
    assert watched
    assert watched <= {metric.name for metric in METRICS}


def test_prometheus_finds_no_fault_in_the_alerts() -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    command = ["promtool", "check", "rules", str(DEPLOY / "alerts.yml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    """The programs it names are not installed here, so existing ones stand in for them."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "planner.service").read_text()
    unit = tmp_path / "planner.service"
    unit.write_text(re.sub(r"(?<=[=+])/\S+/(planner|nvidia-modprobe)\b", "/bin/true", text))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
