"""What an action is, and every way a model can emit one."""
