"""Scripts that run in the browser, and the HTML that they belong to."""

# A pressed tag sends its class and the kind of scores of its map to the server.
ON_TAG = """element.addEventListener('click', event => {
  const tag = event.target.closest('button.tag');
  if (tag) trigger('choose', {index: Number(tag.dataset.class), scores: tag.dataset.scores});
});"""
LINK = """<label for="link-text">Link to this view</label>
<div class="link"><input id="link-text" readonly disabled>
<button type="button" disabled>Copy link</button></div>
<p class="small" role="status"></p>"""
ON_LINK = """const field = element.querySelector('input'), button = element.querySelector('button');
const status = element.querySelector('[role=status]');
const update = () => {
  field.disabled = button.disabled = !props.value;
  status.textContent = '';
  if (!props.value) { field.value = ''; return; }
  history.replaceState(history.state, '', '?' + props.value);
  field.value = location.href;
  if (new URLSearchParams(props.value).get('picture') === 'uploaded')
    status.textContent = 'Your picture is not part of the link: who opens it sees these settings on an example.';
};
watch('value', update);
button.addEventListener('click', async () => {
  field.select();
  try { await navigator.clipboard.writeText(field.value); status.textContent = 'Copied.'; }
  catch { status.textContent = 'The browser does not let this page copy: the link is selected, press Ctrl+C.'; }
});
update();"""
# A screen reader announces this text when it changes.
SPOKEN = '<p class="spoken" role="status"></p>'
ON_SPOKEN = """const update = () => { element.querySelector('p').textContent = props.value || ''; };
watch('value', update);
update();"""
# After a forward pass, controls that still have the values of its request are set to what is shown; that differs if the
# request failed. Controls that the visitor has changed meanwhile belong to the next request.
SETTLE = """(outcome, model, example, upload) => outcome ? [
  model === outcome.asked[0] ? outcome.shown[0] : model,
  example === outcome.asked[1] ? outcome.shown[1] : example,
  upload && upload.path === outcome.asked[2] ? null : upload,
] : [model, example, upload]"""
# For controls that gradio draws: clamp a typed number to the range of its slider before it reaches the server, and make
# the examples one group of radio buttons, so that the arrow keys work.
WHOLE_PAGE = """() => {
  document.addEventListener('input', event => {
    const field = event.target;
    if (field.type !== 'number' || field.value === '' || field.max === '') return;
    const value = Math.min(Math.max(Number(field.value), Number(field.min)), Number(field.max));
    if (value !== Number(field.value)) field.value = value;
  }, true);
  const group = () => document.querySelectorAll('#examples input').forEach(radio => { radio.name = 'examples'; });
  new MutationObserver(group).observe(document.body, {childList: true, subtree: true});
  group();
}"""
