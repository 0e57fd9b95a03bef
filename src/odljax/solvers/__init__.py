"""Solvers: an iteration that was told when to stop. Call it: ``solver(x0, theta) -> Solution``."""

from ._solver import Adjoint, History, Solution, Solver, check, for_steps, until_converged

__all__ = ["Adjoint", "History", "Solution", "Solver", "check", "for_steps", "until_converged"]
