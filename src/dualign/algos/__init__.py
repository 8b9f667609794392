"""Every system by name. To add one: its file here, one line below, a recipe, a golden row, a docs/equations.md row."""

from dualign.algos.awr import AWR, RWR
from dualign.algos.base import Algorithm, Batch, Columns, Stats
from dualign.algos.cispo import CISPO
from dualign.algos.dao import DAO
from dualign.algos.dar import DAR
from dualign.algos.dpo import DPO, OfflineDPO
from dualign.algos.dual_dpo import DualDPO, OfflineDualDPO
from dualign.algos.dual_ppo import DualMixPPO, DualPPO, DualPPOClip
from dualign.algos.grpo import DAPO, GRPO, GSPO, DrGRPO
from dualign.algos.gvpo import GVPO
from dualign.algos.ipo import IPO
from dualign.algos.iter_sft import IterSFT
from dualign.algos.oapl import OAPL
from dualign.algos.pmd import PMD
from dualign.algos.ppo import PPO
from dualign.algos.rloo import RLOO
from dualign.algos.sft import SFT
from dualign.algos.simpo import SimPO
from dualign.algos.slic import SLiC

ALGORITHMS: dict[str, type[Algorithm]] = {
    "dar": DAR,
    "dao": DAO,
    "ppo": PPO,
    "dual_ppo": DualPPO,
    "dual_ppo_clip": DualPPOClip,
    "dual_mix_ppo": DualMixPPO,
    "rloo": RLOO,
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DrGRPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "gvpo": GVPO,
    "oapl": OAPL,
    "pmd": PMD,
    "iter_sft": IterSFT,
    "dpo": DPO,
    "ipo": IPO,
    "slic": SLiC,
    "dual_dpo": DualDPO,
    "offline_dpo": OfflineDPO,
    "offline_dual_dpo": OfflineDualDPO,
    "simpo": SimPO,
    "sft": SFT,
    "rwr": RWR,
    "awr": AWR,
}

__all__ = ["ALGORITHMS", "Algorithm", "Batch", "Columns", "Stats"]
