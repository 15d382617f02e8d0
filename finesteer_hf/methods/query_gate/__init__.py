"""A gate on the query: whether and how much to steer a prompt (Weng et al., ACL 2026, Eq. 6-9 and 15).

Not a method, but a first stage that methods share, with its settings, fit, tensors and run time.
"""

from finesteer_hf.methods.query_gate.config import Gate, GateCalibration, GateScore, QueryGateConfig
from finesteer_hf.methods.query_gate.fit import GateFit, fit_gate
from finesteer_hf.methods.query_gate.read_site import candidate_reads, choose_read_site, separability
from finesteer_hf.methods.query_gate.runtime import QueryGate
from finesteer_hf.methods.query_gate.tensors import check_values, from_file, gate_shapes, to_file


__all__ = [
    "Gate",
    "GateCalibration",
    "GateFit",
    "GateScore",
    "QueryGate",
    "QueryGateConfig",
    "candidate_reads",
    "check_values",
    "choose_read_site",
    "fit_gate",
    "from_file",
    "gate_shapes",
    "separability",
    "to_file",
]
