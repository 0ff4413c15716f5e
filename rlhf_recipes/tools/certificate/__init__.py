"""The certificate of a reward model: is it good enough for PPO?"""

from rlhf_recipes.tools.certificate.certify import certify
from rlhf_recipes.tools.certificate.functional.verdict import judge
from rlhf_recipes.tools.certificate.report import write_certificate
from rlhf_recipes.tools.certificate.rewardbench import reward_bench
from rlhf_recipes.tools.certificate.scoring import Scorer, load_scorer

__all__ = ["Scorer", "certify", "judge", "load_scorer", "reward_bench", "write_certificate"]
