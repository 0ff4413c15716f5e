"""The embedded world: a grammar of short reviews, their exact gold score, and an annotator who judges by it."""

from rlhf_recipes.data.synthetic.annotator import Annotator, Completion
from rlhf_recipes.data.synthetic.gold import GoldScore, GoldWeights, write_gold

__all__ = ["Annotator", "Completion", "GoldScore", "GoldWeights", "write_gold"]
