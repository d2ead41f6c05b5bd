# mypy: allow-untyped-defs
"""The steps the kernels are made of: a block of columns into the running sums, a block of the gradient.

Legend: V vocabulary columns, z logits, m maxima, f = log2(e) / tau. As in ``on_torch.formulas``, everything is fp32 and
in powers of 2.

Forward recurrence. A row's columns are distributed over lanes; in the launch shapes of ``launch`` a lane is a thread.
Each lane keeps its own maxima and sums, which are merged once, at the row's end (``merged``): a reduction over the
block inside the loop would wait at a barrier in every step. With a lane's maxima m and, for the columns it loads,
a = z_s - m_s and b = z_t - m_t:

    S_1 <- S_1 2^((m_s_old - m_s) log2(e)) + sum 2^(a log2(e))
    S   <- S   2^((m_s_old - m_s) f)       + sum 2^(a f)
    W   <- W   2^((m_t_old - m_t) f)       + sum 2^(b f)
    K   <- (K + W_old shift) 2^((m_t_old - m_t) f) + sum 2^(b f) (b - a)

where ``shift`` is by how much b - a of the columns seen so far changes with the new maxima,
(m_t_old - m_t) - (m_s_old - m_s). The losses follow from the sums in ``scalar_kernels.losses_kernel``. In the tile
kernels a lane is a row of the tile.

Gradient: hard_scale (p_s - onehot) + soft_scale (p_s^tau - p_t^tau), from the logits and the row's sums.

``row`` is the tuple (student pointer, student bias, student column stride, teacher pointer, teacher bias, teacher
column stride); biases (V,) and the teacher may be None.

A row of 30,522 words need not begin at a multiple of WIDTH columns (16 bytes). But if the matrices begin at one, the
row begins equally far behind such a multiple in all of them. So places are counted from that multiple, ``head`` columns
before the row (``head_of``). The row is at the places from ``head`` on; pointers and biases are those of place 0
(``row_pointer``). A block that begins at a multiple of WIDTH and lies within the row is loaded and stored WIDTH columns
at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dwt_kernels.on_triton.constants import KL_SCALE, LOG2_E, MINUS_INF


@triton.jit
def head_of(row_index, row_stride, ALIGNMENT: tl.constexpr, WIDTH: tl.constexpr):
    """Places before a row. ``ALIGNMENT``: a power of two, in elements, that divides the rows' offsets."""
    return tl.multiple_of((row_index * row_stride) & (WIDTH - 1), ALIGNMENT)


@triton.jit
def row_pointer(matrix, row_index, row_stride, head, WIDTH: tl.constexpr):
    """Place 0 of a row."""
    return matrix + tl.multiple_of(row_index * row_stride - head, WIDTH)


@triton.jit
def load_logits(pointer, bias, column_stride, columns, mask):
    """fp32 logits of these columns, bias included; -inf where the ``mask`` leaves one out. None leaves none out."""
    pointers = pointer + columns.to(tl.int64) * column_stride
    logits = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=MINUS_INF)
    logits = logits.to(tl.float32)
    if bias is not None:
        if mask is None:
            logits += tl.load(bias + columns).to(tl.float32)
        else:
            logits += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return logits


@triton.jit
def load_student(row, columns, mask):
    return load_logits(row[0], row[1], row[2], columns, mask)


@triton.jit
def load_teacher(row, columns, mask):
    return load_logits(row[3], row[4], row[5], columns, mask)


@triton.jit
def finite_or_zero(maximum):
    """A reference to subtract: where every logit so far is -inf, 0 keeps -inf - reference from being NaN."""
    return tl.where(maximum == MINUS_INF, 0.0, maximum)


@triton.jit
def power(x, factor, residual, UNIT_TEMPERATURE: tl.constexpr):
    """2^(x f), f being factor + residual; see ``layout.Scalars``."""
    return tl.exp2(x * factor) if UNIT_TEMPERATURE else tl.exp2(x * factor + x * residual)


@triton.jit
def rescaled(kl_sum, rescale):
    """Columns that a new maximum makes negligible have no share, even if their divergence was infinite."""
    return tl.where(rescale > 0, rescale * kl_sum, 0.0)


@triton.jit
def lane_places(start, STEPS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The places of a block, (STEPS, LANES x WIDTH): a lane, one thread, has WIDTH neighbours at every step.

    In two dimensions and reshaped when loaded: in a load of three dimensions, some versions of Triton give a thread one
    step of several lanes.
    """
    step, place = tl.arange(0, STEPS), tl.arange(0, LANES * WIDTH)
    return start + step[:, None] * (LANES * WIDTH) + place[None, :]


@triton.jit
def rest_places(
    head,
    V: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block of what the WHOLE places from FIRST on leave of a row, and a mask: the row's end, then its beginning."""
    places = lane_places(FIRST + WHOLE, STEPS, LANES, WIDTH)
    rest = places if FIRST == 0 else tl.where(places < head + V, places, places - V)
    return rest, places < FIRST + V


@triton.jit
def lane_sums(x):
    """Sums (LANES,) of x (STEPS, LANES, WIDTH)."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def add_block(
    state,
    student,
    teacher,
    factor,
    residual,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
):
    """fp32 logits (STEPS, LANES x WIDTH) into ``state``, which is (m_s, S_1, S, m_t, W, K), each (LANES,).

    Of a tile, whose rows are the lanes, logits (LANES, WIDTH) in one step.
    """
    student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = state
    student = tl.reshape(student, (STEPS, LANES, WIDTH))
    new_student_max = tl.maximum(student_max, tl.max(tl.max(student, 2), 0))
    student_reference = finite_or_zero(new_student_max)
    student -= student_reference[None, :, None]
    student_shift = student_max - student_reference
    exponentials = tl.exp2(student * LOG2_E)
    student_sum = student_sum * tl.exp2(student_shift * LOG2_E) + lane_sums(exponentials)
    # Not an early return: Triton would still compile what follows it, with a teacher that is None.
    if teacher is None:
        return new_student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum
    else:
        teacher = tl.reshape(teacher, (STEPS, LANES, WIDTH))
        new_teacher_max = tl.maximum(teacher_max, tl.max(tl.max(teacher, 2), 0))
        teacher_reference = finite_or_zero(new_teacher_max)
        teacher -= teacher_reference[None, :, None]
        tau_exponentials = exponentials if UNIT_TEMPERATURE else power(student, factor, residual, False)
        student_tau_sum *= power(student_shift, factor, residual, UNIT_TEMPERATURE)
        student_tau_sum += lane_sums(tau_exponentials)
        weights = power(teacher, factor, residual, UNIT_TEMPERATURE)
        # A teacher logit of -inf has weight 0 and no share, where 0 x inf would be NaN.
        shares = weights * tl.where(weights > 0, (teacher - student) * KL_SCALE, 0.0)
        teacher_shift = teacher_max - teacher_reference
        rescale = power(teacher_shift, factor, residual, UNIT_TEMPERATURE)
        shift = finite_or_zero(teacher_shift) - finite_or_zero(student_shift)
        kl_sum = rescaled(kl_sum + teacher_sum * (shift * KL_SCALE), rescale) + lane_sums(shares)
        teacher_sum = teacher_sum * rescale + lane_sums(weights)
        return new_student_max, student_sum, student_tau_sum, new_teacher_max, teacher_sum, kl_sum


@triton.jit
def merged(state, factor, residual, HAS_TEACHER: tl.constexpr):
    """One state, of scalars, out of states (n,) of shares of a row's columns."""
    student_max, student_sum, student_tau_sum, teacher_max, teacher_sum, kl_sum = state
    row_student_max = tl.max(student_max, 0)
    student_shift = student_max - finite_or_zero(row_student_max)
    row_student_sum = tl.sum(student_sum * tl.exp2(student_shift * LOG2_E), 0)
    # Not an early return, as above.
    if HAS_TEACHER:
        row_teacher_max = tl.max(teacher_max, 0)
        teacher_shift = teacher_max - finite_or_zero(row_teacher_max)
        row_student_tau_sum = tl.sum(student_tau_sum * power(student_shift, factor, residual, False), 0)
        rescale = power(teacher_shift, factor, residual, False)
        shift = finite_or_zero(teacher_shift) - finite_or_zero(student_shift)
        row_kl_sum = tl.sum(rescaled(kl_sum + teacher_sum * (shift * KL_SCALE), rescale), 0)
        row_teacher_sum = tl.sum(teacher_sum * rescale, 0)
        return row_student_max, row_student_sum, row_student_tau_sum, row_teacher_max, row_teacher_sum, row_kl_sum
    else:
        return row_student_max, row_student_sum, 0.0, 0.0, 0.0, 0.0


@triton.jit
def scan_row(
    row,
    head,
    factor,
    residual,
    V: tl.constexpr,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL_STEPS: tl.constexpr,
    TAIL_WIDTH: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
):
    """The recurrence over a row. What whole blocks leave is apart, so that they need no mask."""
    zeros = tl.zeros((LANES,), tl.float32)
    state = zeros + MINUS_INF, zeros, zeros, zeros + MINUS_INF, zeros, zeros
    for start in range(FIRST, FIRST + WHOLE, STEPS * LANES * WIDTH):
        places = lane_places(start, STEPS, LANES, WIDTH)
        student = load_student(row, places, None)
        teacher = None if row[3] is None else load_teacher(row, places, None)
        state = add_block(state, student, teacher, factor, residual, STEPS, LANES, WIDTH, UNIT_TEMPERATURE)
    if WHOLE < V:
        rest, mask = rest_places(head, V, FIRST, WHOLE, TAIL_STEPS, LANES, TAIL_WIDTH)
        student_rest = load_student(row, rest, mask)
        teacher_rest = None if row[3] is None else load_teacher(row, rest, mask)
        state = add_block(
            state, student_rest, teacher_rest, factor, residual, TAIL_STEPS, LANES, TAIL_WIDTH, UNIT_TEMPERATURE
        )
    return state


@triton.jit
def gradient_of(student, teacher, at_label, terms, factor, residual):
    """The gradient (fp32) from logits (fp32) of a row, or of a tile with ``terms`` of shape (rows, 1).

    ``at_label``: where the label is. ``terms``: ``layout.RowTerms``.
    """
    student_max, teacher_max, hard, student_soft, teacher_soft, label_share = terms
    student -= student_max
    # The soft difference is small or exact, onehot the largest term: this order of additions loses least.
    if teacher is None:
        gradient = hard * tl.exp2(student * LOG2_E)
    else:
        gradient = student_soft * power(student, factor, residual, False)
        gradient -= teacher_soft * power(teacher - teacher_max, factor, residual, False)
        gradient += hard * tl.exp2(student * LOG2_E)
    return gradient - tl.where(at_label, label_share, 0.0)


@triton.jit
def write_gradient_block(out, out_stride, row, label, terms, factor, residual, columns, mask):
    """The gradient of these columns into the row ``out``, which may be the student's."""
    student = load_student(row, columns, mask)
    if row[3] is None:
        gradient = gradient_of(student, None, columns == label, terms, factor, residual)
    else:
        gradient = gradient_of(student, load_teacher(row, columns, mask), columns == label, terms, factor, residual)
    tl.store(out + columns.to(tl.int64) * out_stride, gradient.to(out.dtype.element_ty), mask=mask)


@triton.jit
def write_zeros(out, out_stride, columns, mask):
    zeros = tl.zeros(columns.shape, out.dtype.element_ty)
    tl.store(out + columns.to(tl.int64) * out_stride, zeros, mask=mask)
