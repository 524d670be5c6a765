from autoglm.serving.request_ids import RequestIds


def test_a_callers_id_may_be_used_for_several_requests() -> None:
    ids = RequestIds()
    first, second, other = ids.add("a"), ids.add("a"), ids.add("b")
    assert len({first, second, other}) == 3
    assert set(ids.find("a")) == {first, second}
    ids.remove("a", first)
    assert ids.find("a") == [second]
    ids.remove("a", second)
    assert ids.find("a") == []
    assert ids.find("b") == [other]


def test_finding_keeps_nothing() -> None:
    ids = RequestIds()
    assert ids.find("unknown") == []
    request_id = ids.add("unknown")
    assert ids.find("unknown") == [request_id]
