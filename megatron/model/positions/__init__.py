"""Positions: `places.py` says where tokens are in their text. There is one file for each way to give this to the model.

learned, sinusoidal    added to the word embeddings            rotary        turn queries and keys
alibi, rpe             added to the attention scores           none          nothing at all
"""

from megatron.model.positions.places import START, Places, positions_in_documents

__all__ = ["START", "Places", "positions_in_documents"]
