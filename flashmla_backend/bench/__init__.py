"""`flashmla bench`: our kernels beside the textbook forms and, where they are installed, beside their rivals."""
