"""L3: how a paper plugs in. One file a method, one line in :mod:`bitfloor.methods.table`."""
