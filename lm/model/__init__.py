"""The decoder transformer: config, parameters, tables, body and cache."""
