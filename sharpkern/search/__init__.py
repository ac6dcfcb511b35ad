"""The line search: the smallest step size at which a function of one number exceeds its value at zero."""

from sharpkern.search.line_search import LineSearch as LineSearch
from sharpkern.search.line_search import SearchMemory as SearchMemory
from sharpkern.search.line_search import SearchResult as SearchResult
from sharpkern.search.line_search import Status as Status
from sharpkern.search.line_search import find_critical_lr as find_critical_lr
from sharpkern.search.line_search import warm_grid as warm_grid
