"""A Django site of one page, to run its development server: `python -m tests.support.django_site runserver PORT`.

GET  /        a token against forged requests, and a cookie that belongs to it
POST /        accepted with both and from a page of this site (Origin), then redirects to /done
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

configure = import_module("django.conf").settings.configure  # not by `import`: Django has no types
http, csrf, urls = (import_module(f"django.{name}") for name in ("http", "middleware.csrf", "urls"))

configure(
    DEBUG=True,  # hosts other than localhost are refused
    SECRET_KEY="for tests",
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["django.middleware.common.CommonMiddleware", "django.middleware.csrf.CsrfViewMiddleware"],
)


def form(request: Any) -> Any:
    if request.method == "POST":
        return http.HttpResponseRedirect(request.build_absolute_uri("/done"))
    return http.HttpResponse(csrf.get_token(request))


def done(request: Any) -> Any:
    return http.HttpResponse(f"done at {request.get_host()}")


urlpatterns = [urls.path("", form), urls.path("done", done)]

if __name__ == "__main__":
    import_module("django.core.management").execute_from_command_line(sys.argv)
