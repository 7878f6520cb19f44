"""Node preparation in the chart: off unless asked for, and bounded where it is on."""

from pathlib import Path

import pytest

CHART = Path(__file__).parents[2] / "charts" / "headrace"
ON = ("--set", "nodePreparation.enabled=true")


def test_nothing_is_there_unless_asked_for(render):
    assert not [key for key in render() if key[1].endswith("-node")]


def test_pods_enter_the_node_and_have_nothing_else(render):
    objects = render(*ON)
    pod = objects["DaemonSet", "headrace-node"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["hostPID"] is True
    assert container["securityContext"]["privileged"] is True
    assert {"hostNetwork", "hostIPC", "volumes"}.isdisjoint(pod)
    assert container["command"][:2] == ["headrace-node", "apply"]
    assert "--publish" in container["command"]


def test_the_account_may_patch_and_the_policy_names_it(render):
    objects = render(*ON, namespace="elsewhere")
    rules = objects["ClusterRole", "headrace-node"]["rules"]
    assert [(rule["resources"], rule["verbs"]) for rule in rules] == [(["nodes"], ["patch"])]
    policy = objects["ValidatingAdmissionPolicy", "headrace-node"]["spec"]
    (condition,) = policy["matchConditions"]
    assert "system:serviceaccount:elsewhere:headrace-node" in condition["expression"]
    binding = objects["ValidatingAdmissionPolicyBinding", "headrace-node"]["spec"]
    assert (binding["policyName"], binding["validationActions"]) == ("headrace-node", ["Deny"])


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("nodePreparation.mode=destroy", "mode"),
        ("nodePreparation.everySeconds=1", "everySeconds"),
        ("nodePreparation.hugePages=-1", "hugePages"),
        ("nodePreparation.force=true", "force"),
    ],
)
def test_wrong_values_are_refused_by_name(helm, option, field):
    result = helm("template", "headrace", CHART, *ON, "--set", option)
    assert result.returncode != 0
    assert field in result.stderr
