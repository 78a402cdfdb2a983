"""An engine's settings, the versions of vLLM, and the entry point."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.serving.sparse_engine import CPU

from flexprefill_compile import InvalidOptionError
from flexprefill_compile.integrations import vllm as plugin
from flexprefill_compile.integrations.vllm.settings import make_settings, read_options
from flexprefill_compile.integrations.vllm.versions import check_version
from flexprefill_compile.settings.rank_groups import RankGroup


def test_options_come_from_additional_config_or_the_environment() -> None:
    environment = {"FLEXPREFILL_OPTIONS": '{"gamma": 0.7}'}
    assert read_options({}, {}) == {}
    assert read_options({"other": 1}, environment) == {"gamma": 0.7}
    assert read_options({"flexprefill": {"gamma": 0.9}}, environment) == {"gamma": 0.9}
    assert read_options({"flexprefill": '{"gamma": 0.9}'}, {}) == {"gamma": 0.9}


@pytest.mark.parametrize("given", ["gamma=0.9", "[1]", "3"])
def test_options_that_do_not_parse_are_refused_in_one_sentence(given: str) -> None:
    with pytest.raises(InvalidOptionError, match="FLEXPREFILL_OPTIONS must be a JSON object"):
        read_options({}, {"FLEXPREFILL_OPTIONS": given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 2}, "gamma must be"),
        ({"gama": 0.9}, "did you mean 'gamma'"),
        ({"sequence_parallel": 2}, "can't be given to vLLM"),
        ({"tensor_parallel": 2}, "can't be given to vLLM"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        make_settings(options, CPU, None)


def test_settings_by_head_are_this_rank_s() -> None:
    settings = make_settings({"gamma": [0.1, 0.2, 0.3, 0.4]}, CPU, RankGroup("tp", 2, 1))
    config = settings.of_layer("model.layers.0.self_attn.attn", 2)
    assert config is not None
    assert config.gamma == (0.3, 0.4)
    with pytest.raises(InvalidOptionError, match="one for each of 6 query heads"):
        settings.of_layer("model.layers.0.self_attn.attn", 3)


def test_min_length_is_the_device_s() -> None:
    assert make_settings({}, CPU, None).min_length == 4096


# The plugin


@pytest.mark.parametrize("version", ["0.20.0", "0.20.2", "0.33.0+cu130", "0.32.1.dev3"])
def test_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.19.1", "0.34.0", "1.0", "dev"])
def test_other_versions_are_refused_in_one_sentence(version: str) -> None:
    with pytest.raises(ImportError, match=rf"needs vLLM 0.20 to 0.33, this is {version}"):
        check_version(version)


def test_the_entry_point_registers_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()  # no vLLM, or one without a registry
    registered: dict[Any, str] = {}
    name = "vllm.v1.attention.backends.registry"
    registry = ModuleType(name)
    vars(registry).update(
        AttentionBackendEnum=SimpleNamespace(CUSTOM="custom"), register_backend=registered.__setitem__
    )
    for parent in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, registry)
    plugin.register()
    assert registered == {"custom": plugin.BACKEND}
