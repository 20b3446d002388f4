"""The search for the best placement: candidates, budgets met, the objective of docs/decisions/0006."""
