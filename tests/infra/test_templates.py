"""The CloudFormation templates: clean for cfn-lint and cfn-guard, with the planner's numbers."""

import json
import re
from pathlib import Path

import cfn_guard_rs
import cfnlint
import pytest
from cfnlint.config import ManualArgs

from headrace_cli.sizing.hardware import INSTANCES, TIERS, capacity_fault

INFRA = Path(__file__).parents[2] / "infra"
TEMPLATES = sorted(INFRA.glob("*.yaml"))


def template(name):
    """Return a template as plain data: short forms of functions as their long ones."""
    decoded, _ = cfnlint.decode.decode(str(INFRA / name))
    return json.loads(json.dumps(decoded))


def lint(content):
    return [str(match) for match in cfnlint.lint(content, config=ManualArgs(regions=["us-east-1"]))]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_lint_finds_nothing(path):
    assert lint(path.read_text()) == []


def test_lint_would_find_something():
    assert lint("Resources: {Group: {Type: AWS::EC2::PlacementGroup, Properties: {Strateg: x}}}")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_guard_finds_nothing(path):
    report = cfn_guard_rs.run_checks(template(path.name), (INFRA / "rules.guard").read_text())
    assert report.not_compliant == []
    assert report.compliant


@pytest.mark.parametrize(
    ("name", "rule", "spoil"),
    [
        ("fsx.yaml", "file_systems_have_efa", lambda r: r["FileSystem"].pop("DeletionPolicy")),
        (
            "fsx.yaml",
            "nothing_comes_in_from_everywhere",
            lambda r: r["EfaIn"]["Properties"].update(CidrIp="0.0.0.0/0"),
        ),
        (
            "access.yaml",
            "roles_are_narrow",
            lambda r: r["ModelRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"][
                0
            ].update(Resource="*"),
        ),
    ],
)
def test_guard_would_find_something(name, rule, spoil):
    spoiled = template(name)
    spoil(spoiled["Resources"])
    report = cfn_guard_rs.run_checks(spoiled, (INFRA / "rules.guard").read_text())
    assert [found.Rule.name for found in report.not_compliant] == [rule]


def allowed_sizes(tier):
    rule = template("fsx.yaml")["Rules"][f"SizeAt{tier}"]
    return [int(size) for size in rule["Assertions"][0]["Assert"]["Fn::Contains"][0]]


@pytest.mark.parametrize("tier", TIERS)
def test_sizes_are_those_that_the_planner_takes(tier):
    sizes = allowed_sizes(tier)
    assert sizes
    assert [size for size in sizes if capacity_fault(size, tier, efa=True)] == []


def test_every_size_is_of_a_tier():
    parameters = template("fsx.yaml")["Parameters"]
    assert {int(size) for size in parameters["CapacityGiB"]["AllowedValues"]} == {
        size for tier in TIERS for size in allowed_sizes(tier)
    }
    assert {int(tier) for tier in parameters["ThroughputPerTiB"]["AllowedValues"]} == set(TIERS)


@pytest.mark.parametrize("instance", INSTANCES)
def test_instances_have_the_planners_network_cards_and_architecture(instance):
    cards = template("nodes.yaml")["Mappings"]["Efa"][instance]
    assert sum(cards[f"Card{n}"] == "1" for n in range(17)) == INSTANCES[instance].nics
    architecture = "ARM_64" if INSTANCES[instance].architecture == "arm64" else "x86_64"
    assert cards["AmiType"] == f"AL2023_{architecture}_NVIDIA"


def test_every_instance_has_a_preset_that_the_template_takes():
    allowed = template("nodes.yaml")["Parameters"]["InstanceType"]["AllowedValues"]
    presets = [json.loads(path.read_text()) for path in sorted(INFRA.glob("presets/*.json"))]
    named = [{p["ParameterKey"]: p["ParameterValue"] for p in preset} for preset in presets]
    assert {preset["InstanceType"] for preset in named} == set(allowed) == set(INSTANCES)
    parameters = template("nodes.yaml")["Parameters"]
    needed = {name for name, parameter in parameters.items() if "Default" not in parameter}
    for preset in named:
        assert needed <= preset.keys() <= parameters.keys()
        for name, value in preset.items():
            assert re.search(parameters[name].get("AllowedPattern", ""), value), name


def test_no_interface_but_the_first_has_an_address():
    data = template("nodes.yaml")["Resources"]["LaunchTemplate"]["Properties"]["LaunchTemplateData"]
    first, *others = data["NetworkInterfaces"]
    assert first["InterfaceType"] == "interface"
    kinds = [other["Fn::If"][1] for other in others]
    assert {kind["InterfaceType"] for kind in kinds} == {"efa-only"}
    places = [(kind["NetworkCardIndex"], kind["DeviceIndex"]) for kind in kinds]
    assert places == [(0, 1), *((card, 0) for card in range(1, 17))]
