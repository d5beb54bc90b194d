"""A model whose experts rest in slow memory and move in when a router selects them (CoSMoEs: Huber et al., 2025, section 3.4.2).

units.py       what moves: an expert, or a LoRE, and the parts of the parameters that belong to it
files.py       reading past the page cache, and noticing a file that changed;   store.py   a unit's parts from its files into memory
packed.py      one file with one aligned record for each unit, or an index of other files;   reader.py   threads that read by urgency
policies.py    which unit leaves, one small class for each policy;   table.py   which unit is in which slot: the bookkeeping, pure
counters.py    what is counted, as a table and as JSON;   layer.py   slots, table, reads and counters of one layer together
experts.py     an experts module with slots;   lores.py   LoREs that move;   in_place.py   experts computed where they rest
simulate.py    a routing trace through any policy;   record.py   writes a trace down
budget.py      slots from a budget of memory;   offloaded.py   the layers of a model together;   load.py   loading a model this way
"""
