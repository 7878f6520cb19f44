"""Which moments of a cold start become pictures, and that the picture needs nothing else."""

import xml.etree.ElementTree as ET

from demo.pictures import chosen, draw


def document(stage, read=0):
    """What `headrace status -o json` says of a model with one pod."""
    loader = {"phase": "Loading", "totalBytes": 100, "readBytes": read, "ranks": []}
    pod = {"name": "p", "stage": stage, "node": None, "problem": None, "loaderProblem": None}
    pod |= {"component": "shard" if stage == "shard" else "serve", "sharding": None}
    pod |= {"loader": loader if stage == "load" else None}
    model = {"namespace": "n", "name": "m", "ready": stage == "ready", "reason": "R"}
    model |= {"message": "why", "replicas": 1, "readyReplicas": 0, "conditions": [], "pods": [pod]}
    return {"modelDeployments": [model]}


MOMENTS = [
    (0.0, document("schedule")),
    (1.0, document("shard")),
    (2.0, document("shard")),
    *((3.0 + read / 100, document("load", read)) for read in (0, 40, 90, 100)),
    (5.0, document("engine")),
    (6.0, document("ready")),
]


def test_each_stage_has_one_moment_and_loading_the_one_nearest_its_middle():
    assert [seconds for seconds, _ in chosen(MOMENTS)] == [2.0, 3.4, 5.0, 6.0]
    assert chosen([]) == []


def test_the_picture_is_well_formed_and_fetches_nothing():
    picture = draw(chosen(MOMENTS))
    texts = "".join(ET.fromstring(picture).itertext()).replace("\xa0", " ")
    assert "after 3.4 s" in texts
    assert "n/m" in texts
    assert "url(http" not in picture.replace('"', "")
