"""The chat page in headless Chromium (Debian: chromium); skipped where there is none. NARROWS_SCREENSHOT=FOLDER keeps pictures."""

import json
import os

import pytest

import browser

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture
def page():
    p = browser.Page()
    yield p
    p.close()


def text(page, element):
    return page.run(f"document.getElementById('{element}').textContent")


def picture(page, name):
    if folder := os.environ.get("NARROWS_SCREENSHOT"):
        page.screenshot(os.path.join(folder, name + ".png"))


def test_a_document_is_dropped_asked_about_saved_and_restored(page, server, long_text):
    page.send("Page.navigate", url=server.url + "/")
    page.wait_for("document.readyState === 'complete' && document.getElementById('about').textContent.includes('contexts to')")
    assert page.run("[...document.querySelectorAll('#profile option')].map(o => o.textContent).includes('klt')")

    # Drop a document.
    page.run(f"""(() => {{
        const data = new DataTransfer();
        data.items.add(new File([{json.dumps(long_text[:20000])}], '<b>licence</b>.txt'));
        document.dispatchEvent(new DragEvent('drop', {{dataTransfer: data, bubbles: true, cancelable: true}}));
    }})()""")
    page.wait_for("document.getElementById('document-name').textContent.includes('20.0 thousand')")
    assert "<b>licence</b>" in text(page, "document-name")  # shown, not obeyed

    # Ask: progress first, then the answer comes piece by piece.
    page.run("""(() => {
        document.getElementById('temperature').value = 0;
        document.getElementById('max-tokens').value = 60;
        document.getElementById('question').value = 'What is <i>this</i>?';
        document.getElementById('send').click();
    })()""")
    page.wait_for("/^[1-9][0-9]* of [0-9]+ tokens read/.test(document.getElementById('progress-text').textContent)"
                  " && !document.getElementById('progress').hidden")
    picture(page, "reading")
    page.wait_for("document.querySelectorAll('.message.assistant').length === 1"
                  " && document.querySelector('.message.assistant').textContent.length > 3", seconds=300)
    picture(page, "answering")
    page.wait_for("!document.getElementById('send').disabled", seconds=300)
    assert "What is <i>this</i>?" in page.run("document.querySelector('.message.user').textContent")
    assert page.run("document.querySelector('.message i')") is None
    assert text(page, "bytes-f16").endswith(" MB")
    assert float(text(page, "bytes-f16").split()[0]) > float(text(page, "bytes-kv").split()[0])
    assert float(text(page, "compression")) > 2
    assert float(text(page, "decode-speed")) > 0 and float(text(page, "prefill-speed")) > 0
    assert text(page, "error") == ""
    answer = page.run("document.querySelector('.message.assistant').textContent")

    # Save, and restore in a new page.
    page.run("document.getElementById('session-name').value = 'from-the-page'; document.getElementById('save-button').click()")
    page.wait_for("document.getElementById('session-text').textContent.includes('tokens saved')")
    # The list's button shows all of its word.
    assert page.run("(b => b.scrollWidth <= b.clientWidth && b.offsetHeight < 40)(document.querySelector('#sessions button'))")
    page.run("document.getElementById('sessions').scrollIntoView()")
    picture(page, "saved")
    page.send("Page.reload")
    page.wait_for("document.readyState === 'complete' && document.querySelectorAll('#sessions button').length === 1")
    page.run("document.querySelector('#sessions button').click()")
    page.wait_for("document.getElementById('session-text').textContent.includes('tokens restored')")
    assert page.run("document.querySelector('.message.assistant').textContent") == answer

    # The next question finds the document in the cache.
    page.run("""(() => {
        document.getElementById('max-tokens').value = 4;
        document.getElementById('question').value = 'And who wrote it?';
        document.getElementById('send').click();
    })()""")
    page.wait_for("document.querySelectorAll('.message.assistant').length === 2 && !document.getElementById('send').disabled", seconds=300)
    assert int(text(page, "cached")) > 3000
    assert page.problems == []


def test_errors_are_shown(page, server, long_text):
    page.send("Page.navigate", url=server.url + "/")
    page.wait_for("document.readyState === 'complete' && document.getElementById('about').textContent.includes('contexts to')")
    page.run(f"""(() => {{
        document.getElementById('question').value = {json.dumps(long_text + long_text)};
        document.getElementById('send').click();
    }})()""")
    page.wait_for("!document.getElementById('error').hidden")
    assert "the context holds 8192" in text(page, "error")
    assert not page.run("document.getElementById('send').disabled")
