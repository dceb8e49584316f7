"""log p(continuation | context): a lower bound by Monte Carlo, with its standard error; exact where the model is.

LLaDA's estimator (Eq. 6 of arXiv 2502.09992) draws how many of the L continuation tokens are masked, l ~ U{1 ... L},
then which, and weighs the masked tokens' log-probabilities by L / l:

    log p(x | c) >= E_l E_{M: |M| = l} [ L / l * sum over i in M of log p(x_i | c, x without M) ]

What makes it cheaper at the same error: counts are stratified over the samples and small ones, which are the noisiest,
drawn more often (`masks`); what other samples foretell of a token is taken off and its mean added back (`control`); the
choices of one question share strata and orders, so that their difference is known better than either. A continuation
with few masks to it is summed over all of them. A block-causal model's bound is the sum of its blocks' bounds, each
given the clean blocks before, which are run once for all samples and choices (`blocks`).

An autoregressive model's likelihood is exact and takes one forward pass. A model of uniform noise has its process' own
bound (`processes.uniform`), over times stratified over the samples.
"""
