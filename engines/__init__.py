"""Running and checking exported graphs: runners, verification, engine builders and targets."""
