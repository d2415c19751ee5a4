"""What `pegaflow.prewarm` does around vLLM; the whole of it is run by `make check-prewarm`."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from pegaflow.errors import InvalidInputError
from pegaflow.prewarm import Counts, Runner, connector_config, in_groups, serve


def test_the_connector_of_the_serving_command_line_is_kept() -> None:
    given = {"kv_connector": "PegaKVConnector", "kv_connector_extra_config": {"min_blocks": 2, "socket": "/there"}}
    config = connector_config(given, {"socket": "/here", "prewarm": True})
    assert config["kv_connector_extra_config"] == {"min_blocks": 2, "socket": "/here", "prewarm": True}
    assert config["kv_role"] == "kv_both"
    assert connector_config(None, {})["kv_connector_module_path"] == "pegaflow"
    with pytest.raises(InvalidInputError, match="OtherConnector"):
        connector_config({"kv_connector": "OtherConnector"}, {})


def test_prompts_go_to_vllm_in_groups_of_their_kind() -> None:
    tools = [{"type": "function"}]
    prompts: list[dict[str, Any]] = [
        {"id": 0, "prompt": "a"},
        {"id": 1, "messages": [], "tools": tools},
        {"id": 2, "prompt_token_ids": [1]},
        {"id": 3, "messages": []},
        {"id": 4, "messages": [], "tools": tools},
    ]
    groups = [(options, [prompt["id"] for prompt in group]) for options, group in in_groups(prompts)]
    assert groups == [(None, [0, 2]), ({"tools": tools}, [1, 4]), ({}, [3])]


def test_saves_have_ended_when_all_that_was_offered_is_accounted_for() -> None:
    now = {"offered": 9, "saved": 5, "present": 1, "dropped": 1, "withdrawn": 1}
    counts = Counts(lambda: now)
    assert not counts.has_all_ended()
    now["saved"] = 6
    assert counts.has_all_ended()
    assert counts.since() == {"saved": 6, "present": 1, "dropped": 1}
    now["offered"] = now["saved"] = 10
    assert counts.since() == {"saved": 4, "present": 0, "dropped": 0}


class FakeLlm:
    """Refuses long prompts, whole batches at a time, as vLLM does; its saves end with its second step."""

    def __init__(self) -> None:
        self.steps = 0
        self.batches: list[int] = []

    def generate(self, prompts: list[dict[str, Any]], _sampling: Any, *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        if any(len(prompt["prompt_token_ids"]) > 4 for prompt in prompts):
            raise ValueError("too long")
        self.steps += 1
        self.batches.append(len(prompts))
        return [
            SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], num_cached_tokens=None) for prompt in prompts
        ]

    def get_metrics(self) -> list[Any]:
        saved = 2 if self.steps >= 3 else 0
        return [
            SimpleNamespace(name="vllm:pegaflow_offered_blocks", value=2, labels={}),
            SimpleNamespace(name="vllm:pegaflow_saved_blocks", value=saved, labels={"result": "saved"}),
        ]


def test_one_that_vllm_refuses_does_not_take_the_others_with_it() -> None:
    llm = FakeLlm()
    replies = io.StringIO()
    prompts = [{"id": 7, "prompt_token_ids": [1, 2]}, {"id": 8, "prompt_token_ids": [1, 2, 3, 4, 5]}]
    serve(Runner(llm, None), io.StringIO(json.dumps({"run": prompts}) + "\n"), replies)  # type: ignore[arg-type]
    reply = json.loads(replies.getvalue())
    assert reply["done"] == [{"id": 7, "tokens": 2, "cached": 0}, {"id": 8, "error": "too long"}]
    assert (reply["saved"], reply["present"], reply["dropped"]) == (2, 0, 0)
    # One for the prompt, then as many as the saves took.
    assert llm.batches == [1, 1, 1]
