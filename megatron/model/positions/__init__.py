"""Positions: where tokens stand (`places.py`), and one file for each way of telling the model.

learned, sinusoidal    added to the word embeddings            rotary        turn queries and keys
alibi, rpe             added to the attention scores           none          nothing at all
"""

from megatron.model.positions.places import START, Places, positions_in_documents

__all__ = ["START", "Places", "positions_in_documents"]
