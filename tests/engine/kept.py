"""What a prefix cache may keep when nobody runs."""


def whole(prefixes):
    """Every place and page is accounted for, and nothing is held."""
    known, pages = prefixes._known.values(), prefixes.spill.pages if prefixes.spill else 0
    assert all(block.holders == 0 for block in known)
    places = sorted(prefixes._places + [block.place for block in known if block.place is not None])
    assert places == list(range(len(prefixes._kept)))
    assert set(prefixes._idle) == {block for block in known if block.place is not None}
    assert set(prefixes._asleep) == {block for block in known if block.page is not None}
    if pages and not prefixes.spill.stopped:
        assert sorted(prefixes._pages + [b.page for b in known if b.page is not None]) == list(range(pages))
    for block in known:
        parent = block.key[0]
        assert not hasattr(parent, "key") or prefixes._known.get(parent.key) is parent, "an orphan"
