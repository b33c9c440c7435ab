"""`ctpd rehearse`: a whole recipe with tiny stand-ins for its models, and what the real models need of memory and arithmetic."""
