"""Who is served next inside of an engine: vLLM's queue in the order of ``routing.fairness``."""
