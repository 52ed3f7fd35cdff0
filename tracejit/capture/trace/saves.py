"""What torch saves for the derivatives of its functions: a table that was asked of eager.

A key says which tensors: "1" is the second argument, "1<0" the second argument if the first one
requires grad, "r" all that is returned, "r1" its second part. The functions have the names that
`function_name` gives them, or the last part of these; a function that writes into its first
argument saves what the one without the underscore does, but for that argument. What a function that
is not here saves is told by its rule. `tests/test_saved_versions.py` asks eager again.
"""

SAVES = {
    "": (
        "H T __add__ __radd__ __rdiv__ __rsub__ __sub__ _pad_packed_sequence "
        "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d add adjoint affine_grid "
        "affine_grid_generator alias_copy alpha_dropout as_strided as_strided_copy "
        "as_strided_scatter atleast_1d atleast_2d atleast_3d bernoulli bfloat16 block_diag "
        "broadcast_tensors broadcast_to cartesian_prod cat cauchy_ ceil channel_shuffle clone "
        "col2im column_stack concat concatenate conj conj_physical constant_ constant_pad_nd "
        "contiguous copy_ corrcoef cpu cumsum cumulative_trapezoid deg2rad diag diag_embed "
        "diagflat diagonal diagonal_copy diagonal_scatter diff double dropout dropout1d dropout2d "
        "dropout3d dsplit dstack eq_ expand expand_as expand_copy exponential_ "
        "feature_alpha_dropout feature_dropout fft_fftshift fft_ifftshift fill fill_diagonal_ fix "
        "flatten flip float floor fold frac gaussian_nll_loss ge_ geometric_ greater_ "
        "greater_equal_ gt_ half hinge_embedding_loss hsplit hstack im2col kaiming_uniform_ kron "
        "le_ less_ less_equal_ linalg_cond linalg_diagonal log_normal_ logical_and_ logical_not_ "
        "logical_or_ logical_xor_ lt_ lu_unpack mH mT margin_ranking_loss mean meshgrid moveaxis "
        "movedim msort nanquantile narrow narrow_copy ne_ neg negative normal not_equal_ "
        "pad_sequence permute permute_copy pixel_shuffle pixel_unshuffle poisson polygamma_ "
        "positive quantile rad2deg random_ ravel real repeat repeat_interleave reshape reshape_as "
        "resolve_conj resolve_neg roll rot90 round row_stack rsub select select_copy "
        "select_scatter sign slice_copy slice_scatter special_ndtr special_round split_copy "
        "split_with_sizes_copy squeeze squeeze_copy stack sub subtract sum sum_to_size swapaxes "
        "swapdims t t_copy tanhshrink tensor_split tile to trace transpose transpose_copy "
        "trapezoid trapz tril triplet_margin_loss triplet_margin_with_distance_loss triu trunc "
        "type type_as unbind_copy unflatten unfold unfold_copy uniform_ unsafe_chunk unsafe_split "
        "unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_bicubic2d upsample_bilinear2d "
        "upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_trilinear3d view view_as view_copy vsplit vstack zero_"
    ),
    "0": (
        "Tensor.polygamma _threshold abs absolute acos acosh angle arccos arccosh arcsin arcsinh "
        "arctan arctanh asin asinh atan atanh avg_pool1d avg_pool2d avg_pool3d celu combinations "
        "cos cosh digamma elu erf erfc erfinv gelu glu hardshrink hardsigmoid hardswish hardtanh "
        "i0 instance_norm leaky_relu lgamma linalg_matrix_exp linalg_vander log log10 log1p log2 "
        "log_sigmoid logdet logit lp_pool1d lp_pool2d lp_pool3d matrix_exp mish mvlgamma "
        "nan_to_num nanmean nansum normalize relu6 renorm rrelu selu silu sin sinc sinh softplus "
        "softshrink softsign special_digamma special_entr special_erf special_erfc special_erfinv "
        "special_gammaln special_i0 special_log1p special_logit special_multigammaln special_psi "
        "special_sinc square threshold torch.nn.functional.embedding torch.where var var_mean"
    ),
    "0 1": (
        "_softmax_backward_data arctan2 atan2 clamp_max clamp_min conv_transpose1d "
        "conv_transpose2d conv_transpose3d convolution cosine_embedding_loss fmax fmin "
        "grid_sample grid_sampler grid_sampler_2d grid_sampler_3d huber_loss igamma igammac "
        "logaddexp logaddexp2 masked_select max(other) maximum min(other) minimum "
        "mse_loss multilabel_margin_loss prelu soft_margin_loss special_gammainc "
        "special_gammaincc special_xlog1py special_xlogy special_zeta take xlogy"
    ),
    "0 1 2": "binary_cross_entropy clamp clip conv_tbc nll_loss",
    "0 1 2 6": "binary_cross_entropy_with_logits",
    "0 1 2 r": "ormqr",
    "0 1 4": "multi_margin_loss",
    "0 1 r": "cdist cholesky_solve dist linalg_householder_product linalg_lu_solve orgqr",
    "0 1 r0": "linalg_lstsq triangular_solve",
    "0 1 r1 r2": "native_group_norm",
    "0 2": "gather",
    "0 2 3": "layer_norm",
    "0 2 3 r": "index_reduce scatter_reduce",
    "0 2 3 r1 r2": "native_layer_norm",
    "0 r": (
        "__rpow__ _standard_gamma amax amin aminmax cholesky_inverse cumprod det linalg_det "
        "linalg_pinv linalg_solve linalg_solve_triangular linalg_tensorsolve linalg_vector_norm "
        "logcumsumexp logsumexp max median min nanmedian pinverse prod sgn special_erfcx "
        "special_i0e special_i1 special_i1e special_log_ndtr special_logsumexp std vander"
    ),
    "0 r0": "linalg_slogdet linalg_solve_ex slogdet std_mean",
    "0 r1": (
        "adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices "
        "adaptive_max_pool3d adaptive_max_pool3d_with_indices cummax cummin max_pool1d "
        "max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d "
        "max_pool3d_with_indices svd_lowrank"
    ),
    "0<0 1<0": "__rmod__",
    "0<0 1<1": "cosine_similarity",
    "0<0 1<1 r": "hypot",
    "0<0 r": "copysign",
    "0<1 1": "__div__ __truediv__ div divide true_divide",
    "0<1 1<0": (
        "__mul__ __rmul__ cross dot ger inner linalg_cross linalg_vecdot linear mm mul multiply "
        "mv outer vdot"
    ),
    "0<1 1<1": "__mod__ fmod remainder",
    "0<2 1<3 2<0 3<1": "gru_cell",
    "0<2 1<3 2<0 3<1 r": "rnn_relu_cell rnn_tanh_cell",
    "1": (
        "Tensor.where index_put masked_fill masked_scatter max_unpool1d max_unpool2d max_unpool3d "
        "special_polygamma torch.embedding torch.polygamma"
    ),
    "1 2 r": "lu_solve",
    "1 2<2": "put",
    "1<0 r": "ldexp",
    "1<2 2": "addcdiv",
    "1<2 2<1": "addbmm addcmul addmm addmv addr baddbmm",
    "2": "index_fill index_select scatter",
    "2 3<3": "index_copy",
    "2<3": "scatter_add",
    "2<3 3<3": "index_add",
    "r": (
        "celu_ cholesky elu_ exp exp2 expm1 inverse leaky_relu_ linalg_cholesky linalg_eigvalsh "
        "linalg_inv linalg_lu linalg_lu_factor linalg_qr linalg_svdvals linalg_tensorinv "
        "log_softmax pairwise_distance qr reciprocal relu rrelu_ rsqrt selu_ sigmoid softmax "
        "softmin special_exp2 special_expit special_expm1 special_log_softmax special_ndtri "
        "special_softmax sqrt tan tanh"
    ),
    "r0": "linalg_cholesky_ex linalg_inv_ex",
    "r0 r1": "_lu_with_info linalg_lu_factor_ex",
    "r1": "frexp kthvalue max(dim) median(dim) min(dim) mode nanmedian(dim) sort topk",
}
