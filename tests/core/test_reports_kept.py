"""What agents report: several of one name beside each other, each until it is gone."""

from tunnel.core.reports import MAX_INSTANCES, Reports


def texts(reports: Reports) -> dict[str, tuple[bytes, bool]]:
    return {one.instance: (one.text, one.connected) for one in reports.all()}


def test_two_agents_of_one_name_do_not_overwrite_each_other() -> None:
    reports = Reports()
    for connection, instance in (("c1", "a"), ("c2", "b"), ("c3", "a")):
        reports.begin("acme", "laptop", connection, instance)
    reports.take("acme", "laptop", "c1", b"of a")
    reports.take("acme", "laptop", "c2", b"of b")
    assert texts(reports) == {"a": (b"of a", True), "b": (b"of b", True)}
    reports.take("acme", "laptop", "c3", b"of a, later")
    assert texts(reports)["a"] == (b"of a, later", True)
    reports.end("acme", "laptop", "c1")
    assert texts(reports)["a"][1]
    reports.end("acme", "laptop", "c3")
    assert texts(reports) == {"b": (b"of b", True)}
    reports.end("acme", "laptop", "c2")
    assert texts(reports) == {"b": (b"", False)}  # the last of the name stays for a day, but nothing of what it said
    reports.begin("acme", "laptop", "c4", "c")
    assert texts(reports) == {"c": (b"", True)}


def test_without_an_instance_each_link_is_one() -> None:
    reports = Reports()
    reports.begin("acme", "old", "c1")
    reports.begin("acme", "old", "c2")
    reports.take("acme", "old", "c2", b"two")
    assert texts(reports) == {"c1": (b"", True), "c2": (b"two", True)}


def test_a_name_has_so_many_and_no_more() -> None:
    reports = Reports()
    for at in range(MAX_INSTANCES + 10):
        reports.begin("acme", "many", f"c{at}", f"i{at}")
    assert len(reports.all()) == MAX_INSTANCES
