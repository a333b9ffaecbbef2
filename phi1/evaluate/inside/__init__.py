"""What runs on the sandbox's side: a server that forks, and what its children are. Standard library only."""
