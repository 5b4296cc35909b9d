"""The command line: click commands that talk to the agent's socket; every heavy import waits for the verb."""
