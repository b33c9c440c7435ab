"""Infrastructure that needs no model: errors, configuration, identities, processes and the artifact store."""
