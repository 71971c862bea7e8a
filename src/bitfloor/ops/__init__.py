"""L1: kernels. The plain torch functions here define the result; native code must agree with them."""
