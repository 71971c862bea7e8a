"""L7: arguments, printing and exit codes. Every command imports what it needs when it runs, so that help is instant."""
