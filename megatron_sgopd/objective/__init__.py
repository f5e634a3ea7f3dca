"""SG-OPD's objective: pure functions of torch tensors, without state.

Notation, for token t of response i; every log-prob is of the sampled token, in nats; sg[] stops the gradient:

    s_t      student, being trained
    q_t      teacher, frozen
    r_t      reference, frozen: the initial student
    b_t      behaviour policy: what the rollout engine reported when it sampled the token
    R_i      verifier outcome, 0 or 1
    o_i      outcome advantage, made from R_i by the method's `outcome`                            outcome.py
    delta_t  q_t - sg[s_t]: positive where the teacher wants the token up
    d_t      q_t - r_t where the reference is `initial`, delta_t where it is `live`

The sign-consistency gate and the loss:

    class    neutral where |delta_t| <= tau, agree where o_i delta_t > 0, else conflict            gate.py
    kappa_t  lambda on agree, beta on conflict, 1 on neutral
    eta_t    eta_agree on agree, eta_conflict elsewhere
    A_t      delta_t + (kappa_t - 1) d_t + eta_t o_i                                               loss.py
    w_t      1, or min(exp(sg[s_t] - b_t), C)
    L_on     - sum_t w_t sg[A_t] s_t / N,   N the response tokens of the global batch

The presets are rows of coefficients (methods.py); what a run logs are sums over tokens (metrics.py). Sources: SG-OPD
arXiv 2606.09304, whose own equations were not at hand; ExOPD 2602.12125; OPDVR and GRPD 2608.24696; RG-OPD 2607.04037.
"""
