"""L1: products with packed matrices. The plain torch functions here define the result; kernels must agree with them."""
